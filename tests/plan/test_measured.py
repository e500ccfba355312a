"""``plan.measured``: what was measured of a device is kept, and plans for that device go by it."""

import math
from pathlib import Path

import pytest

from jebi.config import LoraConfig
from jebi.models.sizes import read_sizes
from jebi.plan.cards import CARDS
from jebi.plan.held import Held
from jebi.plan.inventory import GIB
from jebi.plan.jobs import Job
from jebi.plan.measured import Rates, folder, keep, kept, known, known_processor, processor_name
from jebi.plan.prediction import predict

T4 = Rates("Tesla T4", 20e12, None, 8e12, 240e9, 11e9, 9e9, "float16", "2.11.0", 7.5)
JOB = Job(Held(read_sizes("llama-3.2-1b").shape, "nf4", 2, lora=LoraConfig()), 1024, 8, 60)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_it_is_kept_by_the_devices_name() -> None:
    assert kept("Tesla T4") is None
    path = keep(T4)
    assert path.parent == folder()
    assert kept("Tesla T4") == T4
    path.write_text("{}")
    assert kept("Tesla T4") is None, "what cannot be read was never measured"


def test_a_card_goes_by_what_was_measured_of_it() -> None:
    before = known("Tesla T4", 15 * GIB)
    assert before == CARDS["t4"]
    keep(T4)
    card = known("Tesla T4", 15 * GIB)
    assert (card.name, card.memory) == ("t4", before.memory)
    assert (card.products, card.attention, card.bandwidth, card.bus) == (20e12, 8e12, 240e9, 9e9)
    assert not card.bfloat16
    assert card.spread < before.spread
    slower, faster = predict(JOB, card, card.memory), predict(JOB, before, before.memory)
    assert slower.step.products == pytest.approx(faster.step.products * before.products / card.products)
    assert slower.step.attention > faster.step.attention


def test_a_card_that_nobody_knows_has_rates_once_it_is_measured() -> None:
    assert math.isnan(known("Some Card", 8 * GIB).products)
    assert not predict(JOB, known("Some Card", 8 * GIB), 8 * GIB).timed
    keep(Rates("Some Card", 40e12, None, 20e12, 300e9, 20e9, 20e9, "bfloat16", "2.11.0", 7.0))
    assert predict(JOB, known("Some Card", 8 * GIB), 8 * GIB).timed


def test_so_does_the_processor() -> None:
    name = processor_name()
    assert name.endswith(" threads")
    before = known_processor(8 * GIB)
    keep(Rates(name, 1e12, None, 1e11, 20e9, None, None, "float32", "2.11.0", 4.0))
    assert before.products != known_processor(8 * GIB).products == 1e12
