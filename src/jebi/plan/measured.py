"""What `jebi bench device` measured of this machine's devices, kept in the user's cache folder for plans to read.

Measuring is `models.rates`'; cards that were never measured are `cards`'. No torch here.
"""

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from jebi.plan.cards import Card, present_card, processor

_SPREAD = 0.15
"""Share by which times of a measured device may be off."""


@dataclass(frozen=True)
class Rates:
    """What a device reached; None of what it does not have."""

    device: str
    """As its driver calls it; of a processor its name and threads."""
    products: float
    """FLOP/s of products in `dtype`, as large as a layer's."""
    fp8: float | None
    """FLOP/s of the same in 8-bit floats, scaled by rows."""
    attention: float
    """FLOP/s of attention, forward and backward, in rows of 2,048 tokens."""
    bandwidth: float
    """Bytes a second read and written by a copy within its memory."""
    to_device: float | None
    """Bytes a second from pinned host memory."""
    from_device: float | None
    """Bytes a second into pinned host memory."""
    dtype: str
    """What it computes in."""
    torch: str
    """torch's version."""
    seconds: float
    """What the measuring took."""


def folder() -> Path:
    """Where they are kept: ``$XDG_CACHE_HOME/jebi/devices``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jebi" / "devices"


def keep(rates: Rates) -> Path:
    """Keep them; where."""
    path = _file(rates.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(rates), indent=2) + "\n", encoding="utf-8")
    return path


def kept(device: str) -> Rates | None:
    """What was measured of a device; None where that was not, or its file cannot be read."""
    try:
        return Rates(**json.loads(_file(device).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def known(device: str, memory: int) -> Card:
    """The present card that its driver calls so, by what was measured of it, or else by what is known of its kind.

    Of a kind that is not known either it has no rates.

    Args:
        device: its name.
        memory: bytes that its driver says it has.
    """
    card = present_card(device, memory) or Card(device, memory, math.nan, None, math.nan, math.nan)
    rates = kept(device)
    return card if rates is None else _measured(card, rates)


def known_processor(memory: int) -> Card:
    """This machine's processor, likewise."""
    card, rates = processor(os.cpu_count() or 1, memory), kept(processor_name())
    if rates is None:
        return card
    return replace(card, products=rates.products, bandwidth=rates.bandwidth)


def processor_name() -> str:
    """The processor and its threads, as reports name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {psutil.cpu_count()} threads"


def _measured(card: Card, rates: Rates) -> Card:
    bus = min(rates.to_device or card.bus, rates.from_device or card.bus)
    return replace(
        card, products=rates.products, fp8=rates.fp8, bandwidth=rates.bandwidth, bus=bus, attention=rates.attention,
        bfloat16=rates.dtype == "bfloat16", spread=min(card.spread, _SPREAD),
    )  # fmt: skip


def _file(device: str) -> Path:
    return folder() / ("".join(letter if letter.isalnum() else "-" for letter in device) + ".json")
