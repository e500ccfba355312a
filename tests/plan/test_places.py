"""``plan.places``: what may be moved off a card, in which order, and what that frees."""

import dataclasses

import pytest

from jebi.config import Places
from jebi.config.limits import SLICE_BYTES
from jebi.models.families import DecoderShape
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan.places import Relief, reliefs

LAYER = LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5))
LLAMA_8B = DecoderShape((LAYER,) * 32, 128256, tied=False)
TIED = dataclasses.replace(LLAMA_8B, tied=True)
TABLE = 128256 * 4096 * 2
HEAD = TABLE - 2 * SLICE_BYTES


@pytest.mark.parametrize(
    ("shape", "movable", "further"),
    [
        (LLAMA_8B, Places(), [(Places("host", "auto"), TABLE), (Places("host", "host"), TABLE + HEAD)]),
        (LLAMA_8B, Places("card"), [(Places("card", "host"), HEAD)]),
        (LLAMA_8B, Places("host"), [(Places("host", "host"), HEAD)]),
        (LLAMA_8B, Places("auto", "nf4"), [(Places("host", "nf4"), TABLE)]),
        (LLAMA_8B, Places("card", "card"), []),
        (TIED, Places(), [(Places("host", "host"), HEAD)]),
        (TIED, Places("card"), []),
        (TIED, Places("auto", "card"), []),
        (TIED, Places("auto", "host"), []),
    ],
)
def test_what_is_left_open_is_moved_the_embedding_first(
    shape: DecoderShape, movable: Places, further: list[tuple[Places, int]]
) -> None:
    assert reliefs(shape, 2, movable) == [Relief(movable, 0)] + [Relief(*each) for each in further]


def test_a_small_head_stays_since_its_slices_would_take_its_room() -> None:
    small = dataclasses.replace(LLAMA_8B, vocabulary=4096)
    assert [relief.places for relief in reliefs(small, 2, Places())] == [Places(), Places("host")]
    assert [relief.places for relief in reliefs(dataclasses.replace(small, tied=True), 2, Places())] == [Places()]
