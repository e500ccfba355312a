"""Sizes of models that people ask for, as their public config.json files say them: shapes alone, to plan offline."""

from typing import Any


def _sizes(
    model_type: str, width: int, layers: int, heads: tuple[int, int, int], ffn: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A config's fields; ``heads`` are query heads, key/value heads and the size of one."""
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "head_dim": heads[2], "intermediate_size": ffn, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
    } | more  # fmt: skip


_TIED: dict[str, Any] = {"tie_word_embeddings": True}

KNOWN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _sizes("llama", 576, 30, (9, 3, 64), 1536, 49152, **_TIED),
    "smollm2-360m": _sizes("llama", 960, 32, (15, 5, 64), 2560, 49152, **_TIED),
    "smollm2-1.7b": _sizes("llama", 2048, 24, (32, 32, 64), 8192, 49152, **_TIED),
    "llama-3.2-1b": _sizes("llama", 2048, 16, (32, 8, 64), 8192, 128256, **_TIED),
    "llama-3.2-3b": _sizes("llama", 3072, 28, (24, 8, 128), 8192, 128256, **_TIED),
    "llama-3.1-8b": _sizes("llama", 4096, 32, (32, 8, 128), 14336, 128256),
    "llama-3.1-70b": _sizes("llama", 8192, 80, (64, 8, 128), 28672, 128256),
    "mistral-7b": _sizes("mistral", 4096, 32, (32, 8, 128), 14336, 32768, sliding_window=None),
    "mistral-nemo-12b": _sizes("mistral", 5120, 40, (32, 8, 128), 14336, 131072, sliding_window=None),
    "qwen2.5-0.5b": _sizes("qwen2", 896, 24, (14, 2, 64), 4864, 151936, **_TIED),
    "qwen2.5-1.5b": _sizes("qwen2", 1536, 28, (12, 2, 128), 8960, 151936, **_TIED),
    "qwen2.5-3b": _sizes("qwen2", 2048, 36, (16, 2, 128), 11008, 151936, **_TIED),
    "qwen2.5-7b": _sizes("qwen2", 3584, 28, (28, 4, 128), 18944, 152064),
    "qwen2.5-14b": _sizes("qwen2", 5120, 48, (40, 8, 128), 13824, 152064),
    "qwen2.5-32b": _sizes("qwen2", 5120, 64, (40, 8, 128), 27648, 152064),
    "qwen3-0.6b": _sizes("qwen3", 1024, 28, (16, 8, 128), 3072, 151936, **_TIED),
    "qwen3-1.7b": _sizes("qwen3", 2048, 28, (16, 8, 128), 6144, 151936, **_TIED),
    "qwen3-4b": _sizes("qwen3", 2560, 36, (32, 8, 128), 9728, 151936, **_TIED),
    "qwen3-8b": _sizes("qwen3", 4096, 36, (32, 8, 128), 12288, 151936),
    "qwen3-14b": _sizes("qwen3", 5120, 40, (40, 8, 128), 17408, 151936),
    "qwen3-32b": _sizes("qwen3", 5120, 64, (64, 8, 128), 25600, 151936),
    "gemma-2-2b": _sizes("gemma2", 2304, 26, (8, 4, 256), 9216, 256000),
    "gemma-2-9b": _sizes("gemma2", 3584, 42, (16, 8, 256), 14336, 256000),
    "gemma-3-1b": _sizes("gemma3_text", 1152, 26, (4, 1, 256), 6912, 262144, sliding_window=512),
    "phi-3.5-mini": _sizes("phi3", 3072, 32, (32, 32, 96), 8192, 32064),
    "phi-4": _sizes("phi3", 5120, 40, (40, 10, 128), 17920, 100352),
}
"""By the names they are asked for with."""
