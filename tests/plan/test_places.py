"""``plan.places``: what may be moved off a card, in which order, and what that frees."""

import dataclasses

import pytest

from jebi.config import Places
from jebi.config.limits import SLICE_BYTES
from jebi.models.families import DecoderShape
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan.passes import PassPlan, Room
from jebi.plan.places import Relief, best, reliefs

LAYER = LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5))
LLAMA_8B = DecoderShape((LAYER,) * 32, 128256, tied=False)
TIED = dataclasses.replace(LLAMA_8B, tied=True)
VALUES = 128256 * 4096
TABLE = 2 * VALUES
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
        (TIED, Places("host"), []),
    ],
)
def test_what_is_left_open_is_moved_the_embedding_first(
    shape: DecoderShape, movable: Places, further: list[tuple[Places, int]]
) -> None:
    expected = [
        Relief(places, frees, VALUES if "host" in (places.head, shape.tied and places.embedding) else 0)
        for places, frees in [(movable, 0), *further]
    ]
    assert reliefs(shape, 2, movable) == expected


def test_a_small_head_stays_since_its_slices_would_take_its_room() -> None:
    small = dataclasses.replace(LLAMA_8B, vocabulary=4096)
    assert [relief.places for relief in reliefs(small, 2, Places())] == [Places(), Places("host")]
    assert [relief.places for relief in reliefs(dataclasses.replace(small, tied=True), 2, Places())] == [Places()]


def test_a_head_is_moved_where_the_room_is_worth_its_crossing_which_goes_by_its_size() -> None:
    """A pass of 4,096 tokens: 400 / 4,096 of a token's time for Llama 8B's head."""

    def places(scale: int, worth: float) -> Places:
        shape = dataclasses.replace(LLAMA_8B, vocabulary=scale * LLAMA_8B.vocabulary)

        def plan_of(room: Room) -> PassPlan:
            crossing = 400 / 4096 * room.crossing / VALUES
            return PassPlan("none", 4096, cost=crossing + (0.0 if room.card > scale * TABLE else worth))

        return best(reliefs(shape, 2, Places()), 0, Room(0), plan_of)[0].places

    assert places(1, 0.09) == places(2, 0.19) == Places()
    assert places(1, 0.11) == places(2, 0.21) == Places("host", "host")
