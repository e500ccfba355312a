"""``plan.cards``: cards are found as data sheets and drivers spell them."""

import pytest

from jebi.errors import ConfigError
from jebi.plan.cards import CARDS, find_card, present_card, processor
from jebi.plan.inventory import GIB


@pytest.mark.parametrize("name", ["H100", "a100-80", "A100 80", "RTX 4090", "GeForce RTX 3060 12GB", "Tesla T4"])
def test_names_are_read_as_people_write_them(name: str) -> None:
    plain = "".join(letter for letter in name.lower() if letter.isalnum())
    assert find_card(name).name.replace("-", "") in plain


def test_an_unknown_card_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"use one of t4, .*--memory 16GB"):
        find_card("voodoo2")


@pytest.mark.parametrize(
    ("driver", "gigabytes", "name"),
    [
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("NVIDIA GeForce RTX 3060", 12, "rtx3060-12gb"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA A10", 22, "a10"),
    ],
)
def test_drivers_names(driver: str, gigabytes: int, name: str) -> None:
    found = present_card(driver, gigabytes * GIB)
    assert found is not None
    assert found.name == name


def test_a_card_that_is_not_known_is_none() -> None:
    assert present_card("Quadro K600", GIB) is None


def test_numbers_are_sane() -> None:
    """Of one vendor's cards none reaches its data sheet's peak, and 8-bit floats are faster where there are any."""
    assert CARDS["h100"].products == pytest.approx(750e12, rel=0.01)
    assert CARDS["h200"].bandwidth == pytest.approx(4.32e12)
    assert not CARDS["t4"].bfloat16
    for card in [*CARDS.values(), processor(8, 16 * GIB)]:
        assert card.memory > 8 * GIB
        assert card.products > card.bandwidth > card.bus > 1e9 or card.name == "cpu"
        assert card.fp8 is None or card.fp8 > 1.1 * card.products
        assert 0 < card.spread < 1
