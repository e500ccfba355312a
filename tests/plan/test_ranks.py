"""``plan.ranks``: what each process holds and sends, what that costs, and the page that shows what follows from it."""

import dataclasses
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebi.adapters.lora import attach
from jebi.config import LoraConfig, Storage
from jebi.config.launched import World
from jebi.models.hf import JebiForCausalLM
from jebi.models.sizes import read_sizes
from jebi.plan.cards import CARDS
from jebi.plan.held import Held
from jebi.plan.inventory import GIB, adapter_items, everything, kept_weight_bytes, model_items, total
from jebi.plan.jobs import Job
from jebi.plan.prediction import over_more, predict, remedies
from jebi.plan.ranks import NETWORK, Link, StepBytes, efficiency, links_of, step_bytes, waiting, world_of
from jebi.quant.footprint import divided_bytes, weight_bytes
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight
from jebi.training.flat import lay_flat

ROOT = Path(__file__).resolve().parents[2]
LLAMA_70B = Held(read_sizes("llama-3.1-70b").shape, "nf4", 2, lora=LoraConfig())
JOB = Job(LLAMA_70B, 2048, 8, 60)


def among(held: Held, ranks: int, shard: bool = True) -> Held:
    return dataclasses.replace(held, world=World(ranks, ranks, shard))


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
        codes = [buffer for buffer in weight.buffers() if not buffer.is_floating_point()]
        assert divided_bytes(storage, values, 2) == sum(buffer.nbytes for buffer in codes)
        in_three = sum(-(-buffer.nbytes // 3) for buffer in codes) + weight.nbytes - sum(code.nbytes for code in codes)
        assert weight_bytes(storage, values, 2, shares=3) == in_three
        blank = type(weight).blank(shape, weight_NK.dtype, weight_NK.device)
        for made, room in zip(weight.buffers(), blank.buffers(), strict=True):
            assert (made.shape, made.dtype) == (room.shape, room.dtype)


def test_processes_of_a_machine_share_its_layers() -> None:
    assert World(16, 8, shard=True).shares == 8
    assert World(16, 8).shares == World(4, 1, shard=True).shares == World(1, 1, shard=True).shares == 1
    assert world_of(4, shard=True) == World(4, 4, shard=True)
    assert world_of(32, shard=True).shares == 8
    assert world_of(12, shard=True) == World(12, 6, shard=True), "machines have as many each, or loading refuses"


def test_only_frozen_layers_are_divided() -> None:
    """Half of each layer on each of two, and three whole ones; adapter, norms and tables everywhere."""
    one, two = LLAMA_70B, among(LLAMA_70B, 2)
    assert two.parts == pytest.approx(one.parts / 2, rel=1e-3)
    assert two.gathered == pytest.approx(one.parts * 3 / 80, rel=1e-3)
    assert total(model_items(one)) - total(model_items(two)) == one.parts - two.parts
    assert total(adapter_items(two)) - total(adapter_items(one)) == 8, "the loss, and whether to stop"
    assert (one.gathered, one.divided, kept_weight_bytes(two)) == (0, 0, 0)
    made = predict(JOB, CARDS["b200"], CARDS["b200"].memory).plan.made(2048)
    assert total(everything(two, made)) < total(everything(one, made)) - 0.9 * (one.parts - two.parts - two.gathered)
    assert among(LLAMA_70B, 2, shard=False).parts == one.parts


def test_a_step_sends_the_flat_gradients_and_the_layers(
    tiny_llama: Callable[[str], Path], load: Callable[..., JebiForCausalLM]
) -> None:
    model = load(tiny_llama("untied"))
    attach(model, LoraConfig(r=4))
    flat, _ = lay_flat([p for p in model.parameters() if p.requires_grad], spare=2)
    held = Held(model.model.shape, "dense", 4, lora=LoraConfig(r=4))
    assert step_bytes(among(held, 2, shard=False), 3) == StepBytes(flat.nbytes, 0)
    assert step_bytes(held, 3) == StepBytes(0, 0)
    layers = sum(linear.weight.nbytes for name, linear in model.linears() if name != "lm_head")
    over_machines = dataclasses.replace(held, world=World(16, 8, shard=True))
    assert step_bytes(over_machines, 3).gathered == 2 * 3 * layers * 7 // 8


def test_what_is_faster_than_the_layers_costs_nothing() -> None:
    link = Link("", 1e9, 0.0)
    assert waiting(1.0, StepBytes(0, 10**9), 2, link, link) == 0.0
    assert waiting(1.0, StepBytes(10**9, 0), 2, link, link) == 1.0
    assert waiting(1.0, StepBytes(0, 2 * 10**9), 2, link, link) == 1.0
    assert waiting(1.0, StepBytes(0, 0), 1, link, link) == 0.0
    assert efficiency(1.0, 1.0) == 0.5


def test_links_are_the_cards_own_and_the_network_between_machines() -> None:
    through, inside = links_of(world_of(8, shard=False), CARDS["h200"])
    assert (through, inside.name, inside.bytes_s) == (inside, "NVLink", 0.75 * 450e9)
    assert links_of(world_of(16, shard=False), CARDS["h200"]) == (NETWORK, inside)
    assert links_of(world_of(2, shard=False), CARDS["rtx4090"])[0].bytes_s == CARDS["rtx4090"].bus


def test_a_prediction_is_of_each_process_and_its_speed_of_all() -> None:
    card = CARDS["h200"]
    one = predict(
        Job(Held(read_sizes("llama-3.1-8b").shape, "nf4", 2, lora=LoraConfig()), 2048, 8, 60), card, card.memory
    )
    job = dataclasses.replace(one.job, held=among(one.job.held, 8, shard=False))
    eight = predict(job, card, card.memory)
    assert eight.peak == pytest.approx(one.peak, abs=2**10)
    assert (eight.step.links > 0, one.step.links) == (True, 0)
    assert eight.tokens_per_second == pytest.approx(8 * eight.efficiency * one.tokens_per_second)
    assert 0.99 < eight.efficiency < 1
    assert one.efficiency == 1


def test_what_one_card_does_not_hold_several_do() -> None:
    card, host = CARDS["rtx4090"], 64 * GIB
    alone = predict(JOB, card, card.memory, host)
    assert not alone.fits
    shared = over_more(alone, host)
    assert shared is not None
    assert shared.fits
    assert shared.job.held.world == World(2, 2, shard=True)
    copies = predict(dataclasses.replace(JOB, held=among(LLAMA_70B, 2, shard=False)), card, card.memory, host)
    (settings, found), *_ = remedies(copies, host)
    assert settings == ("model.shard=true",)
    assert found.fits
    whole = dataclasses.replace(JOB, held=dataclasses.replace(LLAMA_70B, storage="masters", lora=None))
    assert over_more(predict(whole, card, card.memory, host), host) is None, "what is trained is not divided"
    assert math.isfinite(shared.step.seconds)


def test_the_page_shows_what_is_computed() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "scaling_table.py"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    first, last = table["MARKS"]
    shown = page.split(first)[1].split(last)[0].strip()
    assert shown == "\n".join(table["lines"]()), "python benchmarks/scaling_table.py --write"
