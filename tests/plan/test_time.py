"""``plan.time``: five trainings that were measured, and what must hold of any."""

import dataclasses
import math

import pytest

from jebi.config import Checkpointing, LoraConfig, Places
from jebi.models.families import DecoderShape
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan.activations import Pass
from jebi.plan.cards import CARDS, Card
from jebi.plan.held import Held
from jebi.plan.time import Load, carried_bytes, step_time

LAYER = LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5))
HELD = Held(DecoderShape((LAYER,) * 32, 128256, tied=False), "nf4", 2, lora=LoraConfig())
FULL = Load(16384, 2048, passes=2)
KEPT = Pass(8192, "none", 8192, keep_weights=True)


@pytest.mark.parametrize(
    ("card", "mode", "fp8", "measured"),
    [
        ("h100", "none", False, 16500),
        ("h100", "recompute", False, 12200),
        ("h200", "none", False, 17090),
        ("h200", "none", True, 24600),
    ],
)
def test_measured_trainings(card: str, mode: Checkpointing, fp8: bool, measured: float) -> None:
    """Tokens a second of Llama 8B's shape in rows of 2,048; the card's range is what a prediction promises."""
    held, made = dataclasses.replace(HELD, fp8=fp8), Pass(8192, mode, 8192, keep_weights=mode == "none")
    step = step_time(held, made, FULL, CARDS[card])
    low, high = step.range
    assert low <= FULL.tokens / measured <= high
    assert FULL.tokens / step.seconds == pytest.approx(measured, rel=0.08)


def test_a_short_pass_of_chat_rows() -> None:
    """2,018 tokens in rows of about 250: 120 ms of kernels on an H100."""
    step = step_time(HELD, Pass(2018, "none", 8192, keep_weights=True), Load(2018, 250), CARDS["h100"])
    assert step.seconds - step.host == pytest.approx(0.120, rel=0.12)


def test_the_parts_of_a_profile() -> None:
    """A pass of 8,192 tokens on an H100: products 325 ms, attention 41, the rest 105 (two such passes a step)."""
    step = step_time(HELD, KEPT, FULL, CARDS["h100"])
    assert (step.products + step.head) / 2 == pytest.approx(0.325, rel=0.05)
    assert step.attention / 2 == pytest.approx(0.041, rel=0.05)
    assert step.traffic / 2 == pytest.approx(0.105, rel=0.05)


def test_the_host_has_more_to_do_for_more_matrices() -> None:
    """Two matrices of each of 7 projections in 32 layers, or of one, at 16 us each (fitted)."""
    few = dataclasses.replace(HELD, lora=LoraConfig(target_modules=["q_proj"]))
    hosts = [step_time(held, KEPT, FULL, CARDS["h200"]).host for held in (HELD, few)]
    assert hosts[0] - hosts[1] == pytest.approx(2 * 6 * 32 * 16e-6)


def test_whatever_is_more_takes_longer() -> None:
    def seconds(held: Held = HELD, made: Pass = KEPT, load: Load = FULL) -> float:
        return step_time(held, made, load, CARDS["a100-80"]).seconds

    assert seconds(load=Load(20000, 2048)) > seconds()
    assert seconds(load=Load(16384, 4096)) > seconds()
    assert seconds(load=Load(16384, 2048, learnt=0.5)) < seconds()
    scratch = dataclasses.replace(KEPT, keep_weights=False)
    assert seconds(made=scratch) > seconds()
    assert seconds(made=scratch, load=dataclasses.replace(FULL, passes=8)) > seconds(made=scratch)
    modes = [Pass(8192, mode, 8192, keep_weights=True) for mode in ("none", "keep_attention", "recompute")]
    assert seconds(made=modes[0]) < seconds(made=modes[1]) < seconds(made=modes[2])
    assert seconds(made=dataclasses.replace(modes[2], kept_layers=16)) < seconds(made=modes[2])
    assert seconds(dataclasses.replace(HELD, places=Places("host", "host"))) > seconds()
    offload = Pass(8192, "offload", 8192, keep_weights=True)
    assert seconds(made=offload) > seconds(made=modes[1])
    assert seconds(made=dataclasses.replace(offload, shipped_layers=9)) < seconds(made=offload)


def test_8_bits_in_the_backward_alone_save_half_of_the_products() -> None:
    held = [HELD, dataclasses.replace(HELD, fp8=True, exact_forward=True), dataclasses.replace(HELD, fp8=True)]
    plain, behind, both = (step_time(each, KEPT, FULL, CARDS["h200"]) for each in held)
    assert behind.products == pytest.approx((plain.products + both.products) / 2)
    assert both.seconds < behind.seconds < plain.seconds


def test_what_the_bus_carries_beside_a_forward() -> None:
    """An H200: 23 us a token at 50 GB/s; in 8-bit floats it is done sooner, and an unknown card promises nothing."""
    assert carried_bytes(HELD, CARDS["h200"]) == pytest.approx(23.3e-6 * 50e9, rel=0.01)
    assert carried_bytes(dataclasses.replace(HELD, fp8=True), CARDS["h200"]) < carried_bytes(HELD, CARDS["h200"])
    behind = dataclasses.replace(HELD, fp8=True, exact_forward=True)
    assert carried_bytes(behind, CARDS["h200"]) == carried_bytes(HELD, CARDS["h200"])
    assert carried_bytes(HELD, Card("new", 2**34, math.nan, None, math.nan, math.nan)) == 0
