"""A writer of .gguf files: a tiny checkpoint as llama.cpp's converter lays it out, without tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

GGML = gguf.GGMLQuantizationType
PLUS_ONE = ("gemma", "gemma2", "gemma3")


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """``write_gguf(path, folder, ...)``: the checkpoint of ``folder`` as a .gguf file at ``path``."""
    return write


def write(
    path: Path,
    folder: Path,
    architecture: str = "llama",
    without: str = "",
    kind: str = "F32",
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
) -> Path:
    """Write it.

    Args:
        path: where to.
        folder: a checkpoint of transformers.
        architecture: llama.cpp's name of it.
        without: a header field to leave out.
        kind: how matrices are stored.
        extra: further tensors.
        fields: further header fields of the architecture's.
    """
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    common = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    for name, value in (common | (fields or {})).items():
        if name != without:
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](f"{architecture}.{name}", value)
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    names = gguf.get_tensor_name_map(known or gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        values = laid_out(tensor.numpy(), name, architecture, config)
        stored = GGML[kind] if values.ndim == 2 else GGML.F32
        writer.add_tensor(found, gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def laid_out(values: np.ndarray, name: str, architecture: str, config: Any) -> np.ndarray:
    """A tensor as llama.cpp's conversion/llama.py (`permute`) and conversion/gemma.py (norms) leave it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads and architecture == "llama":
        # The two halves of a head side by side.
        values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    if name.endswith("norm.weight") and architecture in PLUS_ONE:
        values = values + 1
    return np.ascontiguousarray(values)
