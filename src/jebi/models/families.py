"""What a Hugging Face config says in jebi's terms, one function per family, each with its source.

A new family costs one function here and one test. Rotary positions are read by `models.rope`,
weights and tokenizers elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

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


def head_dim(config: PretrainedConfig) -> int:
    """Size of one head: stated, or the width shared among the heads."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


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
