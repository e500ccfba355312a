"""Tiny random checkpoints of every family, written by transformers, and the table that the tests here fill in."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parents[2] / ".testdata" / "compatibility"
"""Where `make compatibility` collects what was measured, one file a checkpoint."""

# Rows of weights are whole blocks of 64, since bitsandbytes on a CPU misreads others.
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


@dataclass(frozen=True)
class Checkpoint:
    """One tiny checkpoint: its type, what differs from `SIZES`, and lengths of rows that reach what it is about."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (11, 7, 4)
    """Windows are of 5 tokens: shorter, as long, and longer rows."""


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.1], "long_factor": [1.5, 4.0], "original_max_position_embeddings": 8}

FACTORS_WHOLE = {
    "short_factor": [1.0 + n / 10 for n in range(8)],
    "long_factor": [1.0 + n for n in range(8)],
    "original_max_position_embeddings": 20,
}

CHECKPOINTS = {
    "llama": Checkpoint("llama", {"tie_word_embeddings": True}),
    "llama, biases, llama3 RoPE": Checkpoint(
        "llama", {"attention_bias": True, "mlp_bias": True, **scaled("llama3", **LLAMA3)}
    ),
    "mistral": Checkpoint("mistral", {"sliding_window": None}),
    "mistral, window": Checkpoint("mistral", {"sliding_window": 5}),
    "ministral": Checkpoint("ministral", {"sliding_window": 5, "layer_types": MIXED}),
    "qwen2": Checkpoint("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window, YaRN": Checkpoint(
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
            **scaled("yarn", factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "qwen3": Checkpoint("qwen3", {"head_dim": 32}),
    "gemma": Checkpoint("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": Checkpoint(
        "gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "head_dim": 32}
    ),
    "gemma3_text": Checkpoint(
        "gemma3_text",
        {
            "sliding_window": 5,
            "query_pre_attn_scalar": 32,
            "head_dim": 32,
            "layer_types": MIXED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": Checkpoint("phi3", {"sliding_window": 5}),
    "phi3, part of a head turned, longrope": Checkpoint(
        "phi3",
        {"original_max_position_embeddings": 8, **scaled("longrope", partial_rotary_factor=0.25, **FACTORS)},
        # transformers takes one set of factors for a whole batch, jebi one for each row: all are long here.
        (11, 9, 10),
    ),
    "phi3, longrope that generation outgrows": Checkpoint(
        "phi3", {"original_max_position_embeddings": 20, **scaled("longrope", **FACTORS_WHOLE)}, (13, 13, 13)
    ),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint(name)``: a folder with one of `CHECKPOINTS`; not to be written to."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(CHECKPOINTS[name].model_type)
            write(CHECKPOINTS[name], made[name])
        return made[name]

    return folder_of


def write(tiny: Checkpoint, folder: Path) -> None:
    """Random weights whose activations stay of order 1, with norms and biases that are not 1 and 0."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(tiny.model_type, **SIZES | tiny.changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    gemma = tiny.model_type.startswith("gemma")
    offset = 0.0 if gemma else 1.0  # Gemma stores norm weights less one
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Gemma multiplies its embeddings by sqrt(D), under which the layers' share would not be seen.
                embeds = gemma and name.endswith("embed_tokens.weight")
                parameter.copy_(drawn * parameter.shape[1] ** (-1.0 if embeds else -0.5))
            else:
                parameter.copy_(0.1 * drawn + (0.0 if name.endswith("bias") else offset))
    model.save_pretrained(folder)


@pytest.fixture
def note() -> Iterator[Callable[[str, str, float | str], None]]:
    """``note(checkpoint, column, value)`` puts a cell into the table."""
    noted: dict[str, dict[str, float | str]] = {}
    yield lambda name, column, value: noted.setdefault(name, {}).update({column: value})
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, cells in noted.items():
        path = RESULTS / f"{name.replace(' ', '-').replace(',', '')}.json"
        # One worker runs all tests of a file, so nobody writes at the same time.
        before = json.loads(path.read_text()) if path.is_file() else {}
        head = {"name": name, "model_type": CHECKPOINTS[name].model_type}
        path.write_text(json.dumps(before | head | cells, indent=2))


@pytest.fixture(scope="session")
def difference() -> Callable[[Tensor, Tensor], float]:
    """``difference(ours, theirs)``: the largest difference, as a share of the largest value."""

    def measure(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def rows() -> Callable[[str, str], dict[str, Tensor]]:
    """``rows(name, form)``: a batch of the checkpoint's lengths, padded "left" or "right", or "packed"."""

    def make(name: str, form: str) -> dict[str, Tensor]:
        """The first two tokens of a row are a prompt."""
        lengths = CHECKPOINTS[name].lengths
        generator = torch.Generator().manual_seed(1)
        if form == "packed":
            ids = torch.randint(3, 300, (1, sum(lengths)), generator=generator)
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            return {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions > 1, -100)}
        longest = max(lengths)
        ids = torch.randint(3, 300, (len(lengths), longest), generator=generator)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, length in enumerate(lengths):
            start = 0 if form == "right" else longest - length
            mask[row, start : start + length] = 1
            labels[row, start + 2 : start + length] = ids[row, start + 2 : start + length]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return make


@pytest.fixture(scope="session")
def model_types() -> set[str]:
    """Model types that have a checkpoint here."""
    return {tiny.model_type for tiny in CHECKPOINTS.values()}


@pytest.fixture(scope="session")
def checkpoint_names() -> list[str]:
    """Names of all checkpoints here."""
    return list(CHECKPOINTS)
