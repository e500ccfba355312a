"""What a card that is too small for a training may be relieved of: embedding and head, which the layers do not need.

They cost the least by the byte: from host memory, an embedding's rows come over the bus one by one, and a head crosses
it once a few thousand learnt tokens (1 GiB in 20 ms at 50 GB/s). What a pass may hold beside them is `plan.passes`'.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jebi.config import Places
from jebi.config.limits import SLICE_BYTES
from jebi.models.families import DecoderShape
from jebi.plan.passes import PassPlan, Room


@dataclass(frozen=True)
class Relief:
    """Places to try, and what they leave free."""

    places: Places
    """Of embedding and head."""
    frees: int
    """Bytes on the card that are free beside those of the first relief."""
    crossing: int = 0
    """Values of the head, where it crosses the bus for each pass."""


def reliefs(shape: DecoderShape, element: int, movable: Places) -> list[Relief]:
    """What may be tried, in this order: everything as it was asked, then the embedding moved, then the head too.

    Args:
        shape: the decoder.
        element: bytes of a number of embedding and head.
        movable: what the user asked for; "auto" may be moved.
    """
    values = shape.vocabulary * shape.layer.width
    table = values * element
    # Two slices of it are on the card in its stead.
    head = table - 2 * SLICE_BYTES
    crossing = values if movable.settled(shape.tied, on_card=True).head == "host" else 0
    found = [Relief(movable, 0, crossing)]
    if shape.tied:
        if movable == Places() and head > 0:
            found.append(Relief(Places("host", "host"), head, values))
        return found
    embedding, freed = movable.embedding, 0
    if embedding == "auto":
        embedding, freed = "host", table
        found.append(Relief(Places(embedding, movable.head), freed, crossing))
    if movable.head == "auto" and head > 0:
        found.append(Relief(Places(embedding, "host"), freed + head, values))
    return found


def best(options: list[Relief], now: int, room: Room, plan_of: Callable[[Room], PassPlan]) -> tuple[Relief, PassPlan]:
    """The relief whose plan is the fastest, or, where nothing fits, the one that frees most; and that plan.

    Args:
        options: what may be tried.
        now: bytes that are free because of what was moved already.
        room: what there is now.
        plan_of: chooses for a room.
    """
    found = []
    for option in options:
        plan = plan_of(replace(room, card=room.card + option.frees - now, crossing=option.crossing))
        found.append((option, plan))
    option, plan = min(found, key=lambda each: each[1].cost)
    return (option, plan) if plan.fits else found[-1]
