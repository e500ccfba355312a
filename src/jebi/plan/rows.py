"""How many tokens rows have, estimated from their texts alone: a plan has no tokenizer and needs none.

The demo's 339 rows of Korean and English say how: Llama 3.1's, Qwen 3's and Gemma 3's tokenizers make a token of 4.2
letters of Latin, and 0.82, 0.94 and 0.71 of a token of a Korean one; SmolLM2's, with a small vocabulary, 2.8.
"""

import csv
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jebi.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv")
"""Files that are looked at."""

_LATIN, _OTHER, _OTHER_SMALL = 1 / 4.2, 0.82, 2.8
"""Tokens of a letter: of Latin, of others, and of others with a small vocabulary."""
_SMALL = 100_000
"""Tokens of a vocabulary below which other scripts are spelled by bytes."""
_TEMPLATE = (109, 55)
"""Letters of Latin and others that the tutorial's template writes around a row (69 tokens of Llama 3.1's)."""
_BEGINNING = (35, 55)
"""Those that it writes before a question: the beginning that all rows with a column "instruction" have in common."""
_MOST = 20_000
"""Rows that are looked at; more say no more about their lengths."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of rows, about."""

    rows: int
    """How many rows there are."""
    mean: float
    """Of a row, cut at the longest allowed."""
    deviation: float
    """Standard deviation."""
    longest: int
    """Of the longest row, not cut."""
    common: float = 0.0
    """Of the beginning that a row shares with the others of its step, which is computed once."""


def estimate(path: Path, most: int, vocabulary: int) -> Lengths:
    """The lengths of a file's rows.

    Args:
        path: a .jsonl, .json or .csv file.
        most: tokens at which longer rows are cut.
        vocabulary: tokens that the model knows.

    Raises:
        DataError: it cannot be read, or holds no rows.
    """
    try:
        rows = _rows(path)
        other = _OTHER if vocabulary >= _SMALL else _OTHER_SMALL
        first = list(islice(rows, _MOST))
        letters = ([sum(pair) for pair in zip(_letters(row), _TEMPLATE)] for row in first)
        seen = [round(plain * _LATIN + rest * other) for plain, rest in letters]
        count = len(seen) + sum(1 for _ in rows)
    except OSError as error:
        raise DataError(f"--rows '{path}' cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError, csv.Error) as error:
        hint = " One object a line is a .jsonl file." if "Extra data" in str(error) else ""
        raise DataError(f"--rows '{path}' cannot be read: {error}.{hint}") from error
    if not seen:
        raise DataError(f"--rows '{path}' holds no rows.")
    cut = [min(length, most) for length in seen]
    alike = isinstance(first[0], dict) and "instruction" in first[0]
    common = _BEGINNING[0] * _LATIN + _BEGINNING[1] * other if alike else 0.0
    return Lengths(count, statistics.fmean(cut), statistics.pstdev(cut), max(seen), min(common, *cut))


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"give a {', '.join(SUFFIXES)} file")
    with path.open(encoding="utf-8-sig", newline="") as lines:
        if path.suffix == ".jsonl":
            held = (line for line in lines if line.strip())
            yield from (json.loads(line) for line in islice(held, _MOST))
            yield from held  # which are counted, and not looked into
        elif path.suffix == ".csv":
            yield from csv.DictReader(lines)
        else:
            found = json.load(lines)
            # A list, or an object one of whose fields is it.
            lists = [found] if isinstance(found, list) else [one for one in _values(found) if isinstance(one, list)]
            yield from lists[0] if lists else ()


def _letters(value: Any) -> tuple[int, int]:
    """Letters of Latin and of other scripts in all texts of a row."""
    if isinstance(value, str):
        plain = sum(letter < "\u0250" for letter in value)
        return plain, len(value) - plain
    counts = [_letters(part) for part in _values(value)]
    return sum(plain for plain, _ in counts), sum(rest for _, rest in counts)


def _values(value: Any) -> Iterable[Any]:
    """What an object or a list holds; nothing of anything else."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
