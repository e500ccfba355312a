"""Which of several processes this is: by the environment that torchrun and accelerate make, before torch is loaded."""

import os


def rank() -> int:
    """This process's number among all that a launcher has started; 0 for a process alone."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
