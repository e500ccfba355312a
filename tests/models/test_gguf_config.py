"""``models.gguf_config`` and names in .gguf files: every architecture beside the checkpoint it was made from.

The .gguf files are written under llama.cpp's names from checkpoints that transformers wrote; what is read back has to
be the same decoder with the same weights, and give transformers' logits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jebi.models.families import read_config
from jebi.models.files import find
from jebi.models.gguf_file import GgufFile
from jebi.models.rope import read_rotary

CPU = torch.device("cpu")
IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 2.0**-17,  # which float32, as the header keeps it, holds exactly
}
HEAD = {"attention.key_length": 32, "attention.value_length": 32}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
SHORT, LONG = [1.0, 1.25], [1.5, 4.0]


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint: its type, what differs from `SIZES`, and what llama.cpp's converter would write of it."""

    model_type: str
    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, list[float]] = field(default_factory=dict)


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | settings}


CHECKPOINTS = {
    "llama, biases": Tiny("llama", "llama", {"attention_bias": True, "mlp_bias": True}, HEAD),
    "mistral": Tiny("mistral", "llama", {"sliding_window": None}, HEAD),
    "qwen2": Tiny(
        "qwen2", "qwen2", {"tie_word_embeddings": True, **rope(rope_theta=1e6)}, HEAD | {"rope.freq_base": 1e6}
    ),
    "qwen2, yarn": Tiny(
        "qwen2",
        "qwen2",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        HEAD | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "qwen3": Tiny("qwen3", "qwen3", {}, HEAD),
    "gemma": Tiny("gemma", "gemma", {"tie_word_embeddings": True}, HEAD),
    "gemma2": Tiny(
        "gemma2",
        "gemma2",
        {"sliding_window": 5, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, **CAPS},
        HEAD | CAPS | {"attention.sliding_window": 5},
    ),
    # 27B's: scores are scaled by the width's share of a head, which the number of layers tells.
    "gemma2, 46 layers": Tiny(
        "gemma2",
        "gemma2",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "num_hidden_layers": 46,
            "intermediate_size": 8,
            **CAPS,
        },
        HEAD | CAPS | {"attention.sliding_window": 5},
    ),
    # Six layers, of which the last is global.
    "gemma3": Tiny(
        "gemma3_text",
        "gemma3",
        {
            "num_hidden_layers": 6,
            "sliding_window": 5,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        HEAD
        | {
            "attention.sliding_window": 5,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": Tiny(
        "phi3",
        "phi3",
        {"sliding_window": 5, "head_dim": 16, "original_max_position_embeddings": 128},
        {"attention.sliding_window": 5, "rope.dimension_count": 16, "rope.scaling.original_context_length": 128},
    ),
    "phi3, part of a head turned, longrope": Tiny(
        "phi3",
        "phi3",
        {
            "sliding_window": None,
            "head_dim": 16,
            "original_max_position_embeddings": 32,
            **rope(
                rope_type="longrope",
                partial_rotary_factor=0.25,
                short_factor=SHORT,
                long_factor=LONG,
                original_max_position_embeddings=32,
            ),
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 4,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": float((1 + np.log(128 / 32) / np.log(32)) ** 0.5),
        },
        {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, write_gguf):
    """``made(name)``: the folder that transformers wrote, and the .gguf file of it."""
    kept: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in kept:
            folder = tmp_path_factory.mktemp("tiny")
            tiny = CHECKPOINTS[name]
            write_checkpoint(tiny, folder)
            extra = {key: np.array(values, dtype=np.float32) for key, values in tiny.extra.items()}
            file = folder / "tiny.gguf"
            kept[name] = folder, write_gguf(file, folder, tiny.architecture, fields=tiny.fields, extra=extra)
        return kept[name]

    return make


def write_checkpoint(tiny: Tiny, folder: Path) -> None:
    """Random weights whose activations stay of order 1, with norms and biases that are not 1 and 0."""
    config = AutoConfig.for_model(tiny.model_type, **SIZES | tiny.changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    gemma = tiny.model_type.startswith("gemma")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(drawn * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.1 * drawn + (0.0 if name.endswith("bias") or gemma else 1.0))
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config(made, name: str) -> None:
    folder, file = made(name)
    ours, theirs = find(str(file)).config(), AutoConfig.from_pretrained(folder)
    assert read_config(ours) == read_config(theirs)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    if name != "mistral":  # which llama.cpp calls a Llama
        assert (ours.model_type, ours.architectures) == (theirs.model_type, theirs.architectures)
    for kind, rotary in read_rotary(theirs, CPU).items():
        mine = read_rotary(ours, CPU)[kind]
        assert torch.equal(mine.inv_freq, rotary.inv_freq)
        # The header keeps it as float32.
        assert mine.scaling == pytest.approx(rotary.scaling, rel=2**-23)
    longer = torch.arange(40)[None]
    tables = [read_rotary(c, CPU)["full_attention"].of_positions(longer, torch.float32)[0] for c in (ours, theirs)]
    assert (tables[0] - tables[1]).abs().max() <= 2**-22


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights(made, load, name: str) -> None:
    folder, file = made(name)
    expected = {stored.name: stored.read() for stored in find(str(folder)).tensors()}
    for stored in GgufFile(file).tensors():
        tensor = expected.pop(stored.name)
        assert stored.shape == tensor.shape
        # Gemma's norms have had one added and taken away: a rounding at 1.
        assert (stored.read() - tensor).abs().max() <= (2**-23 if stored.name.endswith("norm.weight") else 0)
    assert expected == {}


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits(made, load, name: str) -> None:
    folder, file = made(name)
    ids = IDS[:, : int(AutoConfig.from_pretrained(folder).max_position_embeddings)]
    ours = load(file)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    # Of the largest logit: float32's roundings, 6e-8 each, grown by the sums of up to 46 layers.
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
