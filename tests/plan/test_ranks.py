"""``plan.ranks``: bytes as they are held and sent, and the page that shows what follows from them."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebi.adapters.lora import attach
from jebi.config import LoraConfig, Storage
from jebi.models.hf import JebiForCausalLM
from jebi.plan.ranks import (
    Link,
    StepBytes,
    adapter_values,
    efficiency,
    layer_bytes,
    rank_bytes,
    step_bytes,
)
from jebi.quant.footprint import weight_bytes
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight
from jebi.training.flat import lay_flat

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("shape", [(64, 64), (176, 64), (3, 5), (300, 257)])
def test_weights_take_what_is_said(shape: tuple[int, int]) -> None:
    weight_NK = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = shape[0] * shape[1]
    packed: list[tuple[Storage, NF4Weight | Int8Weight]] = [
        ("nf4", NF4Weight.quantize(weight_NK)),
        ("int8", Int8Weight.quantize(weight_NK)),
    ]
    for storage, weight in packed:
        assert weight.nbytes == weight_bytes(storage, values, 2)
        blank = type(weight).blank(shape, weight_NK.dtype, weight_NK.device)
        for made, room in zip(weight.buffers(), blank.buffers(), strict=True):
            assert (made.shape, made.dtype) == (room.shape, room.dtype)


def test_a_model_holds_what_is_said(tiny_llama: Callable[[str], Path], load: Callable[..., JebiForCausalLM]) -> None:
    model = load(tiny_llama("untied"))
    shape = model.model.shape
    dense = sum(linear.weight.nbytes for name, linear in model.linears() if name != "lm_head")
    assert dense == layer_bytes(shape, "dense", 4) * len(shape.layers)
    attach(model, LoraConfig(r=4))
    assert model.trainable_parameters()[0] == adapter_values(shape, 4)
    held = rank_bytes(shape, "dense", 4, 4, ranks=2, shard=False)
    assert held.divided + held.tables == dense + 2 * shape.vocabulary * shape.layer.width * 4
    # In whole blocks of 256 values.
    assert 0 <= held.trained - 16 * adapter_values(shape, 4) < 12 * 256
    halved = rank_bytes(shape, "dense", 4, 4, ranks=2, shard=True)
    assert halved.divided == dense / 2


def test_a_step_sends_the_flat_gradients_and_the_layers() -> None:
    trained = [torch.nn.Parameter(torch.zeros(256, 4))]
    flat, _ = lay_flat(trained, spare=2)
    assert step_bytes(1024, 0, ranks=2, sharing=2, passes=3) == StepBytes(flat.nbytes, 0)
    assert step_bytes(0, 4000, ranks=16, sharing=8, passes=3).gathered == 2 * 3 * 3500


def test_what_is_faster_than_the_layers_costs_nothing() -> None:
    link = Link("", 1e9, 0.0)
    assert efficiency(1.0, StepBytes(0, 10**9), 2, link, link) == 1.0
    assert efficiency(1.0, StepBytes(10**9, 0), 2, link, link) == 0.5
    assert efficiency(1.0, StepBytes(0, 2 * 10**9), 2, link, link) == 0.5
    assert efficiency(1.0, StepBytes(0, 0), 1, link, link) == 1.0


def test_the_page_shows_what_is_computed() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "scaling_table.py"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    first, last = table["MARKS"]
    shown = page.split(first)[1].split(last)[0].strip()
    assert shown == "\n".join(table["lines"]()), "python benchmarks/scaling_table.py --write"
