"""How each family was checked, and with what result: read from ``compatibility.json``, which the tests write.

``make compatibility`` measures it anew; ``docs/compatibility.md`` is the same table with an explanation.
"""

import json
from dataclasses import dataclass
from importlib.resources import files

COLUMNS = ("logits", "loss", "gradients", "generation", "save, load", "4 bits", "PEFT")
"""What is measured for every checkpoint."""


@dataclass(frozen=True)
class Checked:
    """One tiny checkpoint that was held against the other packages."""

    name: str
    """The model type, then what is special about it."""
    model_type: str
    cells: dict[str, float | str]
    """By column: the largest difference as a share of the largest value, or in words."""


def checked() -> list[Checked]:
    """Every checkpoint that was checked."""
    text = files("jebi.models").joinpath("compatibility.json").read_text(encoding="utf-8")
    return [Checked(**entry) for entry in json.loads(text)]
