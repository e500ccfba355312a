"""A .gguf file as a checkpoint: config, tokenizer, and tensors under Hugging Face's names.

The gguf package dequantises the blocks; llama.cpp's layout (its names, its order of the rows of Llama's q and k, one
added to Gemma's norms) is undone here. Source: llama.cpp ``conversion/{llama,qwen,gemma,phi}.py``. The header is
`gguf_header`'s, the config `gguf_config`'s.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from gguf import quants
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from jebi.models.files import StoredTensor
from jebi.models.gguf_config import ROPE_TENSORS, Fields, config_of
from jebi.models.gguf_header import GgufHeader, GgufTensor, read_header

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OTHER_NAMES = {"gemma2": _FOUR_NORMS, "gemma3": _FOUR_NORMS, "phi3": {"ffn_up": "mlp.gate_up_proj"}}
"""Where an architecture's names mean something else than in `_LAYER_NAMES`."""

_NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")


class GgufFile:
    """One .gguf file; its header is parsed once, when something of it is first asked for."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _header(self) -> GgufHeader:
        return read_header(self.path)

    @cached_property
    def _fields(self) -> Fields:
        held = {tensor.name: tensor for tensor in self._header.tensors}
        divisors = {name: _dequantise(self.path, held[name]).tolist() for name in ROPE_TENSORS if name in held}
        return Fields(self.path, self._header.fields, frozenset(held), divisors)

    def config(self) -> PretrainedConfig:
        """The header's numbers as a transformers config."""
        return config_of(self._fields)

    def generation_config(self) -> GenerationConfig | None:
        """GGUF files have none."""
        return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer the header describes, built by transformers."""
        try:
            # A transformers of 2026 or later builds it from the header in 0.4 s; its AutoTokenizer takes 5.
            from transformers.integrations.gguf import (  # type: ignore[attr-defined]  # exported by a lazy module
                convert_gguf_tokenizer,
                get_gguf_tokenizer,
            )
        except ImportError:
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        architecture, vocabulary, settings = get_gguf_tokenizer(str(self.path))
        backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **extra)

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor, dequantised to float32 when it is read; those that are part of the config left out."""
        architecture = self._fields.architecture
        heads: dict[str, int] = {}
        if architecture == "llama":
            queries = self._fields.get("attention.head_count")
            heads = {"q_proj": queries, "k_proj": self._fields.get("attention.head_count_kv", queries)}
        for tensor in self._header.tensors:
            if tensor.name in ROPE_TENSORS:
                continue
            name = _hugging_face_name(tensor.name, architecture)
            rotated = heads.get(name.rpartition(".")[0].rpartition(".")[2], 0)
            less = 1.0 if architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight") else 0.0
            yield StoredTensor(name, tensor.shape, self.path, partial(_read, self.path, tensor, rotated, less))


def _hugging_face_name(name: str, architecture: str) -> str:
    """llama.cpp's name in Hugging Face's spelling; an unknown one stays as it is and is reported by the loader."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    names = _LAYER_NAMES | _OTHER_NAMES.get(architecture, {})
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in names:
        return f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
    return name


def _read(path: Path, tensor: GgufTensor, rotated_heads: int, less: float) -> Tensor:
    """Dequantise one tensor; undo llama.cpp's row order in q and k (pairs beside each other, not halves)."""
    values = _dequantise(path, tensor)
    if less:
        values -= less
    if not rotated_heads:
        return values
    pairs = values.reshape(rotated_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _dequantise(path: Path, tensor: GgufTensor) -> Tensor:
    """One tensor as float32, in memory of its own."""
    stored = np.memmap(path, mode="r", offset=tensor.start, shape=(tensor.nbytes,))
    array = quants.dequantize(stored.reshape(*tensor.shape[:-1], -1), tensor.kind)
    # A float32 tensor comes as it lies in the file, which is mapped for reading alone.
    return torch.from_numpy(array if array.flags.writeable else array.copy())
