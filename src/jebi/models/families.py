"""What a Hugging Face config says in jebi's terms, one function per family, each with its source.

A new family costs one function here and one line in `FAMILIES`; ``docs/families.md`` shows how. Weights, RoPE and
tokenizers are read elsewhere. No torch here.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jebi.errors import ModelError
from jebi.nn.shape import AttentionForm, LayerShape

if TYPE_CHECKING:
    from jebi.kernels.glu import Activation

logger = logging.getLogger(__name__)

Config = Any
"""A transformers config, or the fields of a config.json as `models.sizes` reads them."""


@dataclass(frozen=True)
class DecoderShape:
    """The sizes and flags of a whole decoder."""

    layers: tuple[LayerShape, ...]
    """The shape of each layer; sizes are the same in all, attention may differ."""
    vocabulary: int
    """Rows of the embedding and of the head."""
    tied: bool
    """Whether the head is the embedding."""
    embedding_scale: float = 1.0
    """Factor on the embedded tokens."""
    logit_softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)``."""

    @property
    def layer(self) -> LayerShape:
        """The first layer's shape, for the sizes that all of them have."""
        return self.layers[0]

    @cached_property
    def projected(self) -> int:
        """Values of all projections."""
        return sum(one.outputs * one.inputs for layer in self.layers for _, one in layer.maps())


@dataclass(frozen=True)
class Family:
    """Checkpoints of one ``model_type``."""

    read: Callable[[Config], DecoderShape]
    """Their config in jebi's terms."""
    models: str
    """Whose they are, for people."""
    turns_part: bool = False
    """Whether RoPE may turn a part of a head; transformers' other families pass over the config's word for it."""


def read_config(config: Config) -> DecoderShape:
    """The decoder's shape; `ModelError` for a family or a feature that jebi does not have."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model type '{config.model_type}'{_why(config)} is not supported. Supported: {supported}.")
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int) or getattr(config, name) < 1:
            raise ModelError(
                f"the model's config has {name}={getattr(config, name, None)!r}; a number above 0 is needed."
            )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("use_bidirectional_attention=true (an embedding model) is not supported: jebi's is causal.")
    for name in ("attention_dropout", "resid_pdrop"):
        if getattr(config, name, 0):
            logger.warning(f"{name}={getattr(config, name)} of the model's config is not applied in training.")
    if not family.turns_part and _turns_part(config):
        raise ModelError(
            f"the model's config has partial_rotary_factor, which '{config.model_type}' models do not: delete it."
        )
    shape = family.read(config)
    if shape.layer.heads % shape.layer.kv_heads:
        raise ModelError(
            f"the model's config has num_attention_heads={shape.layer.heads}, which is no multiple of "
            f"num_key_value_heads={shape.layer.kv_heads}."
        )
    return shape


def head_dim(config: Config) -> int:
    """Size of one head: stated, or the width shared among the heads."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def _turns_part(config: Config) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return any(found.get("partial_rotary_factor") not in (None, 1) for found in (parameters, *nested))


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_OTHER_PARTS = {"vision_config": "a vision tower", "audio_config": "an audio tower"}


def _why(config: Config) -> str:
    """What stands in the way, where the config shows it."""
    if any(getattr(config, name, None) for name in _EXPERTS):
        return " (a mixture of experts)"
    return next((f" (with {part})" for name, part in _OTHER_PARTS.items() if getattr(config, name, None)), "")


def _llama(config: Config) -> DecoderShape:
    """Llama 2, 3, 3.1, 3.2, 3.3 and checkpoints of that architecture.

    Source: transformers ``models/llama/modeling_llama.py`` (LlamaDecoderLayer, LlamaAttention, LlamaMLP).
    """
    layer = replace(
        _layer(config, config.hidden_act),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
    return _decoder(config, layer)


def _mistral(config: Config) -> DecoderShape:
    """Mistral 7B and what came after it in that architecture, such as Nemo and Small.

    Source: transformers ``models/mistral/modeling_mistral.py``: Llama without biases, all layers windowed where
    ``sliding_window`` is set.
    """
    layer = _layer(config, config.hidden_act)
    return _decoder(config, _windowed(layer, config.sliding_window))


def _ministral(config: Config) -> DecoderShape:
    """Ministral 8B: Mistral whose layers are local or global by ``layer_types``.

    Source: transformers ``models/ministral/modeling_ministral.py``.
    """
    return _mixed(config, _layer(config, config.hidden_act))


def _qwen2(config: Config) -> DecoderShape:
    """Qwen 1.5 (dense), 2 and 2.5: biases on q, k and v.

    Source: transformers ``models/qwen2/modeling_qwen2.py``.
    """
    return _mixed(config, replace(_layer(config, config.hidden_act), qkv_bias=True))


def _qwen3(config: Config) -> DecoderShape:
    """Qwen 3 (dense): every head's queries and keys are normed.

    Source: transformers ``models/qwen3/modeling_qwen3.py``.
    """
    bias = config.attention_bias
    layer = replace(_layer(config, config.hidden_act), qkv_bias=bias, o_bias=bias, qk_norm=True)
    return _mixed(config, layer)


def _gemma(config: Config) -> DecoderShape:
    """Gemma 1 and CodeGemma: GeGLU, norm weights stored less one, embeddings times sqrt(D).

    Source: transformers ``models/gemma/modeling_gemma.py``. Early checkpoints name the activation ``gelu`` in
    ``hidden_act`` and mean the approximation; ``hidden_activation`` corrects it where it is set.
    """
    bias = config.attention_bias
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    layer = replace(_layer(config, activation), qkv_bias=bias, o_bias=bias, unit_offset=True)
    return replace(_decoder(config, layer), embedding_scale=config.hidden_size**0.5)


def _gemma2(config: Config) -> DecoderShape:
    """Gemma 2: Gemma with four norms a layer, capped scores and logits, every other layer local.

    Source: transformers ``models/gemma2/modeling_gemma2.py``.
    """
    return _later_gemma(config, qk_norm=False)


def _gemma3_text(config: Config) -> DecoderShape:
    """Gemma 3 without its vision tower (270M, 1B): Gemma 2 with normed queries and keys, two RoPEs and no caps.

    Source: transformers ``models/gemma3/modeling_gemma3.py``.
    """
    # transformers 5.23's Gemma 3 passes no cap to its attention, whatever its config says.
    return _later_gemma(config, qk_norm=True)


def _later_gemma(config: Config, qk_norm: bool) -> DecoderShape:
    bias = config.attention_bias
    layer = _layer(config, config.hidden_activation)
    softcap = None if qk_norm else config.attn_logit_softcapping
    if config.query_pre_attn_scalar <= 0:
        raise ModelError(
            f"the model's config has query_pre_attn_scalar={config.query_pre_attn_scalar}; a number above 0 is needed."
        )
    form = AttentionForm(config.query_pre_attn_scalar**-0.5, softcap=softcap)
    flags: dict[str, Any] = {"unit_offset": True, "sandwich": True, "qk_norm": qk_norm}
    layer = replace(layer, attention=form, qkv_bias=bias, o_bias=bias, **flags)
    return replace(
        _mixed(config, layer),
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
    )


def _phi3(config: Config) -> DecoderShape:
    """Phi-3, Phi-3.5 (mini, medium) and Phi-4: fused projections, part of a head turned, all layers windowed.

    Source: transformers ``models/phi3/modeling_phi3.py``. Its ``resid_pdrop`` is 0 in every released checkpoint.
    """
    layer = replace(_layer(config, config.hidden_act), fused=True)
    return _decoder(config, _windowed(layer, config.sliding_window))


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, "Llama 2, 3, 3.1, 3.2, 3.3, SmolLM2, and others of that architecture"),
    "mistral": Family(_mistral, "Mistral 7B, Nemo, Small"),
    "ministral": Family(_ministral, "Ministral 8B"),
    "qwen2": Family(_qwen2, "Qwen 1.5, 2, 2.5 (dense)"),
    "qwen3": Family(_qwen3, "Qwen 3 (dense)"),
    "gemma": Family(_gemma, "Gemma 1, CodeGemma"),
    "gemma2": Family(_gemma2, "Gemma 2"),
    "gemma3_text": Family(_gemma3_text, "Gemma 3 text (270M, 1B)"),
    "phi3": Family(_phi3, "Phi-3, Phi-3.5, Phi-4", turns_part=True),
}
"""Model types that jebi loads, by the config's ``model_type``."""

_ACTIVATIONS: dict[str, "Activation"] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _layer(config: Config, activation: str) -> LayerShape:
    """What every family says in the same words."""
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"activation '{activation}' of the model's config is not supported; supported: {', '.join(_ACTIVATIONS)}."
        )
    size = head_dim(config)
    return LayerShape(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=size,
        ffn=config.intermediate_size,
        eps=config.rms_norm_eps,
        attention=AttentionForm(size**-0.5),
        activation=_ACTIVATIONS[activation],
    )


def _windowed(layer: LayerShape, window: int | None) -> LayerShape:
    if window is not None and window < 1:
        raise ModelError(
            f"the model's config has sliding_window={window}; a number above 0 is needed, or null for none."
        )
    return replace(layer, attention=replace(layer.attention, window=window))


def _decoder(config: Config, layer: LayerShape) -> DecoderShape:
    """All layers alike."""
    return DecoderShape((layer,) * config.num_hidden_layers, config.vocab_size, bool(config.tie_word_embeddings))


def _mixed(config: Config, layer: LayerShape) -> DecoderShape:
    """Local and global layers by the config's ``layer_types``."""
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ModelError("the model's config has layer_types with 'sliding_attention', and no sliding_window for them.")
    local = replace(_windowed(layer, config.sliding_window), kind="sliding_attention")
    kinds = {"full_attention": layer, "sliding_attention": local}
    for kind in config.layer_types:
        if kind not in kinds:
            raise ModelError(
                f"layer type '{kind}' of the model's config is not supported; supported: {', '.join(kinds)}."
            )
    if len(config.layer_types) != config.num_hidden_layers:
        raise ModelError(
            f"the model's config has num_hidden_layers={config.num_hidden_layers}, "
            f"and layer_types for {len(config.layer_types)}."
        )
    layers = tuple(kinds[kind] for kind in config.layer_types)
    return DecoderShape(layers, config.vocab_size, bool(config.tie_word_embeddings))
