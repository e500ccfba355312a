"""The card or processor that `jebi plan` plans for: the one that is named, or this machine's, read without torch."""

import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jebi.errors import ConfigError
from jebi.plan.budget import budget_bytes
from jebi.plan.cards import Card, find_card
from jebi.plan.measured import known, known_processor


@dataclass(frozen=True)
class Device:
    """Where a run would be."""

    card: Card
    """Its rates."""
    budget: int
    """Bytes that it may take there."""
    host: int
    """Bytes of host memory beside it."""

    @property
    def bfloat16(self) -> bool:
        """Whether 16-bit numbers are computed with; every card has some kind of them."""
        return self.card.name != "cpu" or _processor_has_bfloat16()


def device_for(gpu: str | None, memory: str | None) -> Device:
    """The device that is asked for.

    Args:
        gpu: a known card's name; None takes the one in this machine, or without one its processor.
        memory: bytes to stay within, as `plan.budget` reads them; without a card's name of a card unknown.

    Raises:
        ConfigError: there is no such card, or it has less memory.
    """
    if gpu is not None:
        card = find_card(gpu)
        return Device(card, budget_bytes(memory, card.memory, "--memory"), card.memory)
    if memory is not None:
        size = budget_bytes(memory, 2**50, "--memory")
        if size > 2**40:
            raise ConfigError(f"--memory '{memory}' is of a card: name it with --gpu, or say a size such as 16GB.")
        # Its rates are not known, so nothing is timed.
        card = Card("a card", size, math.nan, None, math.nan, math.nan)
        return Device(card, size, size)
    import psutil

    free = int(psutil.virtual_memory().available)
    if (found := _present()) is not None:
        return Device(found[0], found[1], free)
    return Device(known_processor(psutil.virtual_memory().total), free, 0)


def _present() -> tuple[Card, int] | None:
    """This machine's first card and the memory that is free there, as its driver says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
        name, total, free = lines[0].rsplit(",", 2)
        memory, left = int(total) * 2**20, int(free) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return known(name.strip(), memory), left


def _processor_has_bfloat16() -> bool:
    """As `models.device` asks torch; elsewhere than on Linux it is taken for granted."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx512_bf16" in flags or "amx_tile" in flags
