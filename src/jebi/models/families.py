"""What a Hugging Face config says in jebi's terms, one function per family, each with its source.

A new family costs one function here and one test. Weights and tokenizers are read elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jebi.errors import ModelError
from jebi.nn.layer import LayerShape


@dataclass(frozen=True)
class DecoderShape:
    """The sizes and flags of a whole decoder."""

    layer: LayerShape
    """The shape of each layer."""
    layers: int
    """How many layers there are."""
    vocabulary: int
    """Rows of the embedding and of the head."""
    tied: bool
    """Whether the head is the embedding."""


def read_config(config: PretrainedConfig) -> DecoderShape:
    """The decoder's shape; `ModelError` for a family or a feature that jebi does not have."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model type '{config.model_type}' is not supported. Supported: {', '.join(sorted(FAMILIES))}."
        )
    return family(config)


def rope_frequencies(config: PretrainedConfig, device: torch.device) -> tuple[Tensor, float]:
    """Inverse frequencies (d / 2,) float32 and the tables' factor, with the config's scaling applied.

    transformers' own functions do it, so every scaling type it knows means the same here.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        size = head_dim(config)
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
        return 1.0 / (float(parameters["rope_theta"]) ** (steps / size)), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ModelError(f"rope_type '{kind}' is not known. Known: default, {', '.join(ROPE_INIT_FUNCTIONS)}.")
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, device)
    return inv_freq.float(), float(scaling)


def head_dim(config: PretrainedConfig) -> int:
    """Size of one head: stated, or the width shared among the heads."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def extend_context(config: PretrainedConfig, max_seq_length: int) -> str | None:
    """Scale RoPE in ``config`` when ``max_seq_length`` exceeds what the model was trained for; say what was done.

    Positions are divided by the excess (linear scaling, arXiv:2306.15595), so that none is larger than in training.
    """
    trained = int(config.max_position_embeddings)
    if max_seq_length <= trained:
        return None
    parameters = dict(config.rope_parameters)
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ModelError(
            f"max_seq_length={max_seq_length} exceeds the model's {trained}, and its RoPE is already scaled "
            f"('{kind}'). Set max_seq_length to {trained} or less."
        )
    factor = max_seq_length / trained * float(parameters.get("factor", 1.0))
    config.rope_parameters = {**parameters, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = max_seq_length
    return f"max_seq_length {max_seq_length} exceeds the model's {trained}: RoPE scaled linearly by {factor:g}"


def _llama(config: PretrainedConfig) -> DecoderShape:
    """Llama 2, 3, 3.1, 3.2, 3.3 and checkpoints of that architecture.

    Source: transformers ``models/llama/modeling_llama.py`` (LlamaDecoderLayer, LlamaAttention, LlamaMLP).
    """
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act '{config.hidden_act}' is not supported in a llama model; supported: silu.")
    layer = LayerShape(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim(config),
        ffn=config.intermediate_size,
        eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
    return DecoderShape(layer, config.num_hidden_layers, config.vocab_size, bool(config.tie_word_embeddings))


FAMILIES: dict[str, Callable[[PretrainedConfig], DecoderShape]] = {"llama": _llama}
"""Model types that jebi loads, by the config's ``model_type``."""
