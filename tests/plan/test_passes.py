"""``plan.passes``: what a pass may hold is obeyed, grows with memory, and is counted as the layers really keep it."""

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jebi.adapters.lora import attach
from jebi.config import LoraConfig
from jebi.kernels.linear_cross_entropy import CHUNK_BYTES
from jebi.models.decoder import Checkpointing
from jebi.models.families import DecoderShape
from jebi.nn.layer import DecoderLayer, LayerShape
from jebi.nn.layer_node import Keep, run_layer
from jebi.nn.rows import rows_from_lengths
from jebi.plan.passes import CPU_PASS_TOKENS, PassPlan, choose, kept_bytes_per_token, work_bytes_per_token

LLAMA_8B = DecoderShape(
    LayerShape(4096, 32, 8, 128, 14336, 1e-5, attention_bias=False, mlp_bias=False), 32, 128256, tied=False
)
MODES: tuple[Checkpointing, ...] = ("none", "recompute", "offload")
GB = 2**30


def plan(free: float, asked: Checkpointing | None = None, longest: int = 2048, limit: int = 32768) -> PassPlan:
    return choose(LLAMA_8B, 2, int(free * GB), longest, asked, limit)


@pytest.mark.parametrize("free", [0.1, 2.0, 8.0, 40.0, 1000.0])
@pytest.mark.parametrize("asked", MODES)
def test_what_is_asked_is_obeyed_whatever_the_memory(asked: Checkpointing, free: float) -> None:
    assert plan(free, asked).checkpointing == asked


def test_left_open_it_keeps_everything_while_a_pass_then_still_holds_the_longest_row() -> None:
    per_token = kept_bytes_per_token(LLAMA_8B, 2, "none") + work_bytes_per_token(LLAMA_8B, 2)
    needed = (2048 * per_token + 2 * CHUNK_BYTES) / 0.8 / GB
    assert plan(1.01 * needed, limit=2048).checkpointing == "none"
    assert plan(0.99 * needed, limit=2048).checkpointing == "recompute"
    assert plan(1000.0) == PassPlan("none", 32768)


def test_a_short_memory_makes_short_passes_and_never_none() -> None:
    assert plan(0.0).tokens == plan(-1.0).tokens == 1
    assert plan(0.0).checkpointing == "recompute"


@pytest.mark.parametrize("asked", [*MODES, None])
def test_more_memory_never_makes_shorter_passes_in_the_same_mode(asked: Checkpointing | None) -> None:
    plans = [plan(free / 4, asked) for free in range(1, 400)]
    for smaller, larger in pairwise(plans):
        if smaller.checkpointing == larger.checkpointing:
            assert smaller.tokens <= larger.tokens <= 32768
    modes = [made.checkpointing for made in plans]
    assert modes == sorted(modes, key=["recompute", "none", "offload"].index), "one change of mode at most"


def test_a_pass_is_never_longer_than_is_worth_it() -> None:
    assert plan(1000.0, limit=CPU_PASS_TOKENS, longest=100) == PassPlan("none", CPU_PASS_TOKENS)


@pytest.mark.parametrize("element", [2, 4])
def test_the_less_is_kept_the_less_is_counted(element: int) -> None:
    kept = [kept_bytes_per_token(LLAMA_8B, element, mode) for mode in MODES]
    assert kept[0] > 10 * kept[1] > kept[2] == 0
    assert kept[1] == 32 * 4096 * element


KEEP: dict[Checkpointing, Keep] = {"none": "all", "recompute": "input"}


@pytest.mark.parametrize("mode", KEEP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_is_counted(
    mode: Checkpointing, dtype: torch.dtype, tiny_llama: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    """Every tensor that a layer's graph holds on to, each storage once, but for the adapters' small ``x A^T``."""
    model = load(tiny_llama("tied"), dtype)
    rank, tokens = 1, 96
    attach(model, LoraConfig(r=rank))
    shape = dataclasses.replace(model.model.shape, layers=1)
    rows = rows_from_lengths([tokens], torch.device("cpu"))
    hidden = torch.randn(tokens, shape.layer.width).to(dtype).requires_grad_()
    tables = model.model.tables(rows.positions_U, dtype)
    counted = kept_by(model.model.layers[0], hidden, tables, rows, KEEP[mode])
    predicted = tokens * kept_bytes_per_token(shape, dtype.itemsize, mode)
    adapters = 7 * tokens * rank * dtype.itemsize if mode == "none" else 0
    assert predicted <= counted <= predicted + adapters


def kept_by(layer: DecoderLayer, hidden: Tensor, tables: Any, rows: Any, keep: Keep) -> int:
    """Bytes of all tensors saved for the backward, by autograd or by the layer's own record."""
    storages: dict[int, int] = {}

    def note(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                note(getattr(value, field.name))
        elif isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                note(part)

    def pack(tensor: Tensor) -> Tensor:
        note(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run_layer(layer, hidden, tables, rows, keep)
    assert out.grad_fn is not None
    for name, value in vars(out.grad_fn).items():
        if name not in ("layer", "tables", "rows", "trained"):
            note(value)
    for held in (*layer.parameters(), *tables, rows.positions_U):
        assert isinstance(held, nn.Parameter | Tensor)
        storages.pop(held.untyped_storage().data_ptr(), None)
    return sum(storages.values())
