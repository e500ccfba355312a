"""Several processes on paper: bytes that a step sends over the links between them, and what that costs.

What each of them holds is `held`'s and `inventory`'s.
"""

import math
from dataclasses import dataclass

from jebi.config.launched import World
from jebi.config.limits import TRAVELLING
from jebi.plan.cards import REACHED, Card
from jebi.plan.held import Held
from jebi.plan.inventory import trained

MACHINES = (2, 4, 8)
"""Cards that machines have; more than the most are of several machines."""


@dataclass(frozen=True)
class StepBytes:
    """What one process sends in an optimizer step, and receives as much of."""

    reduced: int
    """Of gradients, all of whose passes are done."""
    gathered: int
    """Of weights, while layers are computed; 0 where they are not divided."""


@dataclass(frozen=True)
class Link:
    """What connects two processes."""

    name: str
    """What it is called."""
    bytes_s: float
    """Bytes a second that large messages reach in each direction."""
    delay_s: float
    """Before a message's first byte arrives, as usually measured of NCCL's rings."""


NETWORK = Link("100 Gbit/s", REACHED * 12.5e9, 20e-6)
"""What is taken to be between machines, for each card."""


def world_of(gpus: int, shard: bool) -> World:
    """Processes on so many cards, of one machine or as few as they need with as many on each."""
    return World(gpus, max(here for here in range(1, MACHINES[-1] + 1) if gpus % here == 0), shard)


def links_of(world: World, card: Card) -> tuple[Link, Link]:
    """The slowest link of the ring through all processes, and the one between those of a machine."""
    inside = Link("the bus", card.bus, 10e-6) if card.link is None else Link("NVLink", card.link, 5e-6)
    return (NETWORK if world.ranks > world.here else inside), inside


def step_bytes(held: Held, passes: float) -> StepBytes:
    """What a process sends in a step of so many passes, by rings.

    An all-reduce sends all bytes but a process's own share twice (Patarasuk and Yuan, 2009, "Bandwidth optimal
    all-reduce algorithms"), a gather of what is divided once; a layer is gathered for its forward and its backward.
    """
    ranks, shares = held.world.ranks, held.world.shares
    buffer = trained(held.matrices, held.optimizer).gradients + 4 * TRAVELLING
    gathered = 2 * math.ceil(passes) * (shares - 1) * held.divided // shares
    return StepBytes(2 * (ranks - 1) * buffer // ranks, gathered)


def waiting(compute_s: float, sent: StepBytes, ranks: int, link: Link, inside: Link) -> float:
    """Seconds that the links add to a step.

    Gradients travel when everything is computed; weights while layers are, so that only what takes longer than those
    counts. Processes that wait for one with more tokens are left out.

    Args:
        compute_s: seconds of a step without the links.
        sent: what each process sends.
        ranks: processes.
        link: the slowest of the ring through all of them, over which gradients are averaged.
        inside: what connects those that share layers.
    """
    if ranks == 1:
        return 0.0
    reduce_s = sent.reduced / link.bytes_s + 2 * (ranks - 1) * link.delay_s
    return max(0.0, sent.gathered / inside.bytes_s - compute_s) + reduce_s


def efficiency(compute_s: float, waiting_s: float) -> float:
    """Speed of several processes over as many times that of one, the same rows a process."""
    return compute_s / (compute_s + waiting_s)
