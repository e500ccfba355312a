"""Turn what the tests here measured into ``src/jebi/models/compatibility.json`` and ``docs/compatibility.md``.

make compatibility                                 # measure, then write both
python tests/compatibility/write_table.py --check  # is the page what the .json says?
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / ".testdata" / "compatibility"
TABLE = ROOT / "src" / "jebi" / "models" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"

INTRODUCTION = """\
# Compatibility

Written by `make compatibility`; the tests that measure it (`tests/compatibility`) run in `make test` too and fail above
1e-4.

Each line is a tiny random checkpoint, written by transformers, with windows, caps, scalings and biases that its rows
reach. jebi's model and transformers' are loaded from it, both with the same LoRA on every projection. A cell is the
largest difference as a share of the largest value, in float32.

- **logits, loss, gradients**: rows padded on the right, on the left, and packed; the gradient of every adapter matrix.
- **generation**: greedy, three prompts of different lengths padded on the left.
- **save, load**: jebi's checkpoint read by transformers.
- **4 bits**: logits and gradients against bitsandbytes' NF4 with double quantisation.
- **PEFT**: jebi's adapter folder read by `peft.PeftModel.from_pretrained` on transformers' model.

`jebi models` prints the worst of each family. [How to add a family](families.md).
"""


def collect() -> list[dict[str, Any]]:
    """What the tests left behind, in the order of their checkpoints."""
    entries = []
    for path in sorted(MEASURED.glob("*.json")):
        cells = json.loads(path.read_text(encoding="utf-8"))
        name, model_type = cells.pop("name"), cells.pop("model_type")
        rounded = {key: float(f"{value:.1e}") if isinstance(value, float) else value for key, value in cells.items()}
        entries.append({"name": name, "model_type": model_type, "cells": rounded})
    return entries


def render(entries: list[dict[str, Any]]) -> str:
    """The page."""
    from jebi.models.compatibility import COLUMNS

    lines = [INTRODUCTION, "| checkpoint | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for entry in entries:
        values = (entry["cells"][column] for column in COLUMNS)
        cells = (f"{value:.1e}" if isinstance(value, float) else value for value in values)
        lines.append(f"| {entry['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both, or check the page against the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != render(json.loads(TABLE.read_text(encoding="utf-8"))):
            sys.exit("docs/compatibility.md is not what compatibility.json says: run make compatibility")
        return
    entries = collect()
    TABLE.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(entries), encoding="utf-8")
    print(f"{len(entries)} checkpoints: {PAGE.relative_to(ROOT)}, {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
