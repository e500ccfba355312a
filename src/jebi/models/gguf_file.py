"""A .gguf file as a checkpoint: config, tokenizer, and tensors under Hugging Face's names.

The gguf package parses the file and dequantises its blocks; the layout (llama.cpp's names, and its order of the rows
of q and k) is undone here. Source of both: llama.cpp ``conversion`` of LlamaForCausalLM.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, quants
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from jebi.errors import ModelError, WeightsError
from jebi.models.files import StoredTensor

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
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile:
    """One .gguf file; it is parsed once, when something of it is first asked for."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def _reader(self) -> GGUFReader:
        try:
            return GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise WeightsError(f"'{self.path}' is truncated or is no GGUF file: {error}") from error

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def config(self) -> PretrainedConfig:
        """The header's numbers as a transformers config."""
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ModelError(f"'{self.path.name}' holds architecture '{architecture}'. Supported in GGUF files: llama.")

        def number(key: str, default: Any = None) -> Any:
            value = self._field(f"llama.{key}", default)
            if value is None:
                raise WeightsError(f"'{self.path}' lacks the header field 'llama.{key}'.")
            return value

        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none" or any(t.name == "rope_freqs.weight" for t in self._reader.tensors):
            raise ModelError(
                f"'{self.path.name}' scales its RoPE (as Llama 3.1 and later do), which is not read from GGUF yet: "
                "load the model's safetensors checkpoint."
            )
        heads, width = number("attention.head_count"), number("embedding_length")
        return LlamaConfig(
            vocab_size=len(self._field("tokenizer.ggml.tokens", ())) or number("vocab_size"),
            hidden_size=width,
            intermediate_size=number("feed_forward_length"),
            num_hidden_layers=number("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=number("attention.head_count_kv", heads),
            head_dim=number("attention.key_length", width // heads),
            max_position_embeddings=number("context_length"),
            rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base", 10000.0)},
            tie_word_embeddings="output.weight" not in {t.name for t in self._reader.tensors},
            bos_token_id=self._field("tokenizer.ggml.bos_token_id"),
            eos_token_id=self._field("tokenizer.ggml.eos_token_id"),
            pad_token_id=self._field("tokenizer.ggml.padding_token_id"),
            architectures=["LlamaForCausalLM"],
        )

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
        """Every tensor, dequantised to float32 when it is read."""
        heads = int(self._field("llama.attention.head_count"))
        kv_heads = int(self._field("llama.attention.head_count_kv", heads))
        size = self.path.stat().st_size
        for tensor in self._reader.tensors:
            if tensor.data_offset + tensor.n_bytes > size:
                raise WeightsError(f"'{self.path}' is truncated: tensor '{tensor.name}' ends beyond the file.")
            name = _hugging_face_name(tensor.name)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            rotated = {"q_proj": heads, "k_proj": kv_heads}.get(name.rpartition(".")[0].rpartition(".")[2], 0)
            yield StoredTensor(name, shape, self.path, lambda t=tensor, r=rotated: _read(t, r))  # type: ignore[misc]


def _hugging_face_name(name: str) -> str:
    """llama.cpp's name in Hugging Face's spelling; an unknown one stays as it is and is reported by the loader."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _read(tensor: ReaderTensor, rotated_heads: int) -> Tensor:
    """Dequantise one tensor; undo llama.cpp's row order in q and k (pairs beside each other, not halves)."""
    array = quants.dequantize(tensor.data, tensor.tensor_type)
    # A float32 tensor comes as it lies in the file, which is mapped for reading alone.
    values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if not rotated_heads:
        return values
    pairs = values.reshape(rotated_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
