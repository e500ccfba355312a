"""The processes of a training, and which of them this is: by the environment that torchrun and accelerate make, before
torch is loaded.
"""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Processes that train together, one a card."""

    ranks: int = 1
    """How many there are."""
    here: int = 1
    """How many of them are on a machine."""
    shard: bool = False
    """Whether those of a machine divide the frozen layers among them."""

    @property
    def shares(self) -> int:
        """In how many parts the frozen layers are."""
        return self.here if self.shard else 1


ALONE = World()
"""One process."""


def rank() -> int:
    """This process's number among all that a launcher has started; 0 for a process alone."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here(count: int | None = None) -> int:
    """How many of them are on this machine; of ``count`` where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count or ranks()))


def world(shard: bool = False) -> World:
    """All of them, with the layers divided or not."""
    return World(ranks(), here(), shard)
