"""A .gguf header's fields as a transformers config, one function per architecture.

Sources: llama.cpp ``conversion/{llama,qwen,gemma,phi}.py`` for what is written, and its ``llama-model.cpp`` for what is
not written but implied by the architecture.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jebi.errors import ModelError, WeightsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the config: what each of RoPE's frequencies is divided by."""


Settings = tuple[str, dict[str, Any]]
"""A model type and its config's settings."""


@dataclass(frozen=True)
class Fields:
    """The header's fields by their names behind the architecture's, and what else a config is made of."""

    file: Path
    """The file, for messages."""
    fields: dict[str, Any]
    """All of the header's fields."""
    tensors: Container[str]
    """The names of its tensors."""
    divisors: dict[str, list[float]]
    """The values of those of `ROPE_TENSORS` that there are."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.fields.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the architecture's; of one that is a list by layers, the value that all layers have.

        Raises:
            WeightsError: there is no such field, and no default.
            ModelError: the layers differ in it.
        """
        key = f"{self.architecture}.{name}"
        value = self.fields.get(key, default)
        if value is None:
            raise WeightsError(f"'{self.file}' lacks the header field '{key}'.")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"'{self.file}': '{key}' differs between layers, which jebi does not have.")
            value = value[0]
        return value

    def has(self, name: str) -> bool:
        """Whether there is such a field of the architecture's."""
        return f"{self.architecture}.{name}" in self.fields

    def tokens(self, name: str) -> Any:
        """A field of the tokenizer's, or None."""
        return self.fields.get(f"tokenizer.ggml.{name}")


def config_of(fields: Fields) -> "PretrainedConfig":
    """The config that the header describes.

    Raises:
        ModelError, WeightsError: as `settings_of` says.
    """
    from transformers import AutoConfig

    model_type, settings = settings_of(fields)
    return AutoConfig.for_model(model_type, **settings)


def settings_of(fields: Fields) -> Settings:
    """The same as a model type and its config's settings. No torch here.

    Raises:
        ModelError: the architecture, or its way of scaling RoPE, is not supported.
        WeightsError: a field is missing.
    """
    if fields.architecture not in ARCHITECTURES:
        raise ModelError(
            f"'{fields.file.name}' holds architecture '{fields.architecture}'. "
            f"Supported in GGUF files: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[fields.architecture](fields)


def _common(fields: Fields, family: str) -> dict[str, Any]:
    """What every architecture has."""
    heads = fields.get("attention.head_count")
    return {
        "vocab_size": len(fields.tokens("tokens") or ()) or fields.get("vocab_size"),
        "hidden_size": fields.get("embedding_length"),
        "intermediate_size": fields.get("feed_forward_length"),
        "num_hidden_layers": fields.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(fields),
        "max_position_embeddings": fields.get("context_length"),
        "rms_norm_eps": fields.get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(fields),
        "tie_word_embeddings": "output.weight" not in fields.tensors,
        "bos_token_id": fields.tokens("bos_token_id"),
        "eos_token_id": fields.tokens("eos_token_id"),
        "pad_token_id": fields.tokens("padding_token_id"),
        "architectures": [f"{family}ForCausalLM"],
    }


def _rope(fields: Fields) -> dict[str, Any]:
    """RoPE's base and scaling, in transformers' keys."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base", 10000.0)}
    length = fields.get("context_length")
    trained = fields.get("rope.scaling.original_context_length", length)
    if divisors := fields.divisors.get("rope_freqs.weight"):
        # Llama 3.1's scaling, already worked out for each frequency; transformers' longrope divides by such numbers.
        return parameters | _divided(fields, divisors, divisors, length, 1.0)
    long, short = (fields.divisors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long and short:
        return parameters | _divided(fields, short, long, trained, fields.get("rope.scaling.attn_factor", 1.0))
    kind = fields.get("rope.scaling.type", "none")
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": fields.get("rope.scaling.factor")}
    if kind == "yarn":
        return parameters | {
            "rope_type": "yarn",
            "factor": fields.get("rope.scaling.factor"),
            "original_max_position_embeddings": trained,
        }
    if kind != "none":
        raise ModelError(
            f"'{fields.file.name}' scales its RoPE by '{kind}', which is not read from GGUF: "
            "load the model's safetensors checkpoint."
        )
    return parameters


def _divided(fields: Fields, short: list[float], long: list[float], trained: int, attention: float) -> dict[str, Any]:
    """Frequencies divided one by one: by ``short`` in rows of up to ``trained`` tokens, by ``long`` in others."""
    turned = fields.get("rope.dimension_count", _head_dim(fields))
    if len(short) != turned // 2 or len(long) != turned // 2:
        raise WeightsError(
            f"'{fields.file}': RoPE's factors are {len(short)} and {len(long)}, and its frequencies {turned // 2}."
        )
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": trained,
        "factor": fields.get("context_length") / trained,
        "attention_factor": attention,
    }


def _head_dim(fields: Fields) -> int:
    share = fields.get("embedding_length") // fields.get("attention.head_count")
    return int(fields.get("attention.key_length", share))


def _llama(fields: Fields) -> Settings:
    """Llama and Mistral, which llama.cpp does not tell apart."""
    return "llama", dict(
        **_common(fields, "Llama"),
        attention_bias="blk.0.attn_q.bias" in fields.tensors,
        mlp_bias="blk.0.ffn_up.bias" in fields.tensors,
    )


def _qwen2(fields: Fields) -> Settings:
    return "qwen2", dict(**_common(fields, "Qwen2"), use_sliding_window=False)


def _qwen3(fields: Fields) -> Settings:
    bias = "blk.0.attn_q.bias" in fields.tensors
    return "qwen3", dict(**_common(fields, "Qwen3"), attention_bias=bias, use_sliding_window=False)


def _gemma(fields: Fields) -> Settings:
    return "gemma", dict(**_common(fields, "Gemma"), hidden_act="gelu_pytorch_tanh")


_GEMMA2_27B, _GEMMA3_27B = 46, 62
"""Numbers of layers by which llama.cpp knows the models whose scores are scaled by the width's share of a head."""


def _gemma2(fields: Fields) -> Settings:
    return "gemma2", dict(
        **_common(fields, "Gemma2"),
        query_pre_attn_scalar=_score_scale(fields, _GEMMA2_27B),
        sliding_window=fields.get("attention.sliding_window"),
        attn_logit_softcapping=fields.get("attn_logit_softcapping", 50.0),
        final_logit_softcapping=fields.get("final_logit_softcapping", 30.0),
    )


def _gemma3(fields: Fields) -> Settings:
    """Local layers have a base of their own, 10,000, which the file may leave unsaid, and are never scaled."""
    common = _common(fields, "Gemma3")
    local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", 10000.0)}
    common["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": local}
    return "gemma3_text", dict(
        **common,
        query_pre_attn_scalar=_score_scale(fields, _GEMMA3_27B),
        sliding_window=fields.get("attention.sliding_window"),
        final_logit_softcapping=fields.get("final_logit_softcapping")
        if fields.has("final_logit_softcapping")
        else None,
    )


def _score_scale(fields: Fields, largest: int) -> int:
    """What scores are divided by the root of; no field says it."""
    if fields.get("block_count") == largest:
        return int(fields.get("embedding_length") // fields.get("attention.head_count"))
    return _head_dim(fields)


def _phi3(fields: Fields) -> Settings:
    common = _common(fields, "Phi3")
    size = common.pop("head_dim")
    turned = fields.get("rope.dimension_count", size)
    common["rope_parameters"] |= {"partial_rotary_factor": turned / size}
    return "phi3", dict(
        **common,
        original_max_position_embeddings=fields.get(
            "rope.scaling.original_context_length", fields.get("context_length")
        ),
        # llama.cpp writes 0 where there is none, as in Phi-4.
        sliding_window=fields.get("attention.sliding_window", 0) or None,
    )


ARCHITECTURES: dict[str, Callable[[Fields], Settings]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
"""llama.cpp's architectures that jebi reads."""
