"""Records of .jsonl and .csv files from their lines, one by one; a fault is named by its line.

Who holds the lines, a whole file (`data.sources`) or a piece of one (`data.streams`), is the caller's affair.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from jebi.errors import DataError

Read: TypeAlias = Callable[[Path, Iterable[str]], Iterator[dict[str, Any]]]
"""A file's name for messages, and its lines with their ends, to records."""


def jsonl_records(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One object a line; empty lines are passed over."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"'{path}' line {number}: invalid JSON: {error.msg} at column {error.colno}.") from error
        if not isinstance(record, dict):
            raise DataError(f"'{path}' line {number}: a row must be an object with columns, not {record!r:.40}.")
        yield record


def csv_records(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Every cell as the text it is: guessing types would make 7 of 007, and nothing of an answer that says None."""
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"'{path}' names a column twice: {', '.join(header)}.")
        for values in reader:
            if values and len(values) != len(header):
                raise DataError(
                    f"'{path}' line {reader.line_num}: {len(values)} values, but the first line names {len(header)}."
                )
            if values:
                yield dict(zip(header, values))
    except csv.Error as error:
        raise DataError(f"'{path}' line {reader.line_num}: {error}.") from error
