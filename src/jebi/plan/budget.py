"""How much memory a run may take, as people say it: bytes, "16GB", a share of the card, or "free" for all there is."""

import re
from collections.abc import Mapping
from typing import Any

from jebi.config import Checkpointing
from jebi.errors import ConfigError

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
FREE = "free"
"""All that is free, as where nothing is said."""


def budget_bytes(budget: float | str | None, total: int, setting: str = "memory_budget") -> int:
    """Bytes of a budget; gigabytes are 2**30 bytes, as in the report.

    Args:
        budget: bytes, a text such as "16GB" or "900 MiB", a share of ``total`` up to 1; "free" and None are all of it.
        total: bytes there are.
        setting: what messages call it.

    Raises:
        ConfigError: it is none of these, or more than there is.
    """
    if budget in (None, FREE):
        return total
    way_out = 'use bytes, a text such as "16GB", a share such as 0.5, or "free" for all there is.'
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", budget.lower())
        if match is None:
            raise ConfigError(f"{setting} '{budget}' is no size: {way_out}")
        number, unit = float(match[1]), match[2]
        found = int(number * _UNITS[unit]) if unit or number > 1 else int(number * total)
    else:
        found = int(budget * total) if budget <= 1 else int(budget)
    if found <= 0:
        raise ConfigError(f"{setting} {budget!r} leaves nothing: {way_out}")
    if found > total:
        raise ConfigError(
            f"{setting} {budget!r} is more than the {total / 2**30:.1f} GB there are: lower it, or drop it."
        )
    return found


def checkpointing_of(train: Mapping[str, Any]) -> Checkpointing | None:
    """What a config's section ``train`` says that layers keep; None where it leaves that open."""
    if not train.get("gradient_checkpointing"):
        return None
    offload = dict(train.get("gradient_checkpointing_kwargs") or {}).get("offload")
    return "offload" if offload else "recompute"
