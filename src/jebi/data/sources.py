"""Rows from where they lie: files, folders of files, or a data set on the hub.

JSON and CSV are read by `data.records`, so that a fault is named by its line; the rest is the datasets package's work.
Several sources are put together by `data.mixing`, and streams are `data.streams`'.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Json, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from jebi.data.records import csv_records, jsonl_records
from jebi.errors import DataError

UNREADABLE = (DatasetsError, ValueError, TypeError, OSError, RuntimeError, OverflowError)
"""What the datasets package and the parsers under it raise for a file that is not what it should be."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Files that are read."""

OPTIONAL_COLUMNS = ("input", "system", "history", "tools", "weight")
"""Columns that a row may leave out."""


def load_rows(source: str, split: str = "train") -> Dataset:
    """The rows of a file, of a folder's files in the order of their names, or of a hub data set.

    A folder that ``Dataset.save_to_disk`` wrote is read as that.

    Raises:
        DataError: nothing there, unreadable, or empty.
    """
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and not path.is_dir():
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split)
    elif path.exists() or source.count("/") != 1:
        raise DataError(
            f"'{source}' is no .jsonl, .json, .csv or .parquet file, no folder of them and no hub id (owner/name)."
        )
    else:
        rows = _from_hub(source, split)
    if len(rows) == 0:
        raise DataError(f"'{source}' holds no rows.")
    return rows


def files_of(path: Path) -> list[Path]:
    """The data files in a folder and the folders under it, by name; hidden ones are left."""
    found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise DataError(f"folder '{path}' holds no .jsonl, .json, .csv or .parquet file.")
    return found


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise DataError(f"data file '{path}' does not exist.")
    readers = {".jsonl": _read_records, ".json": _read_json, ".csv": _read_records, ".parquet": _read_parquet}
    return readers[path.suffix](path)


def _read_folder(path: Path, split: str) -> Dataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except UNREADABLE as error:
            raise DataError(f"'{path}' cannot be read: {reason(error)}") from error
        if isinstance(saved, Dataset):
            return saved
        assert isinstance(saved, DatasetDict)
        if split not in saved:
            raise DataError(f"'{path}' has no split '{split}'. It has: {', '.join(map(str, saved))}.")
        return saved[split]
    files = files_of(path)
    parts = [_read_file(file) for file in files]
    for file, part in zip(files, parts):
        if set(part.column_names) != set(parts[0].column_names):
            raise DataError(
                f"'{file}' has columns {', '.join(part.column_names)}, but '{files[0]}' has "
                f"{', '.join(parts[0].column_names)}: name them as sources of their own in data.train."
            )
    try:
        return concatenate_datasets(parts)
    except UNREADABLE as error:
        raise DataError(f"the files of '{path}' do not go together: {reason(error)}") from error


def require_columns(rows: Dataset, columns: tuple[str, ...], source: str) -> None:
    """`DataError` unless every column is there and every row has text in it; an ``input`` may be null."""
    for column in columns:
        if column not in rows.column_names:
            raise DataError(f"'{source}' has no column '{column}'. It has: {', '.join(rows.column_names)}.")
        for number, value in enumerate(rows[column], 1):
            if value is None and column != "input":
                raise DataError(f"'{source}' row {number} has nothing in column '{column}'; fill it in or drop it.")
            if value is not None and not isinstance(value, str):
                raise DataError(f"'{source}' row {number}, '{column}': {value!r:.40} is no text; put it in quotes.")


def _read_records(path: Path) -> Dataset:
    return _dataset(list((jsonl_records if path.suffix == ".jsonl" else csv_records)(path, _lines(path))), path)


def _read_json(path: Path) -> Dataset:
    try:
        records = json.loads("".join(_lines(path)))
    except json.JSONDecodeError as error:
        hint = " One object a line is a .jsonl file." if error.msg == "Extra data" else ""
        raise DataError(f"'{path}' line {error.lineno}: invalid JSON: {error.msg}.{hint}") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(f"'{path}' must hold a list of objects.")
    return _dataset(records, path)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from error
    # Not splitlines, which also splits at characters that JSON and answers may hold.
    return [f"{line}\n" for line in text.split("\n")]


def _dataset(records: list[dict[str, Any]], path: Path) -> Dataset:
    if not records:
        raise DataError(f"'{path}' holds no rows.")
    columns = dict.fromkeys(key for record in records for key in record)
    for number, record in enumerate(records, 1):
        if lacking := columns.keys() - record.keys() - set(OPTIONAL_COLUMNS):
            raise DataError(f"'{path}' row {number} lacks column '{min(lacking)}', which other rows have.")
    # Arrow would give every object the members of all the others, as nulls: a tool call would gain arguments.
    nested = {name for record in records for name, value in record.items() if _is_nested(value)}
    if mixed := _mixed_column(records, set(columns)):
        raise DataError(f"'{path}': {mixed}")
    try:
        flat = Dataset.from_list([{name: r.get(name) for name in columns if name not in nested} for r in records])
        if not nested:
            return flat
        types = {name: Json() if name in nested else flat.features[name] for name in columns}
        return Dataset.from_list([{name: r.get(name) for name in columns} for r in records], features=Features(types))
    except UNREADABLE as error:
        raise DataError(f"'{path}': {reason(error)}") from error


def _is_nested(value: Any) -> bool:
    """Whether it holds objects, whose members may differ from row to row."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, dict | list) for v in value))


def _mixed_column(records: list[dict[str, Any]], columns: set[str]) -> str | None:
    """Name the first column whose rows hold different kinds of values."""
    for column in sorted(columns):
        kinds = {type(record.get(column)).__name__ for record in records} - {"NoneType"}
        if len(kinds) > 1:
            return f"column '{column}' holds {' and '.join(sorted(kinds))}; write one kind in every row."
    return None


def _read_parquet(path: Path) -> Dataset:
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        # The datasets package knows a file by its path and time; the name has it look at what the file holds.
        return load_dataset("parquet", content, data_files=str(path), split="train")
    except UNREADABLE as error:
        raise DataError(f"'{path}' cannot be read: {reason(error)}") from error


def _from_hub(source: str, split: str) -> Dataset:
    try:
        rows = load_dataset(source, split=split)
    except UNREADABLE as error:
        raise DataError(f"data set '{source}', split '{split}', cannot be loaded: {reason(error)}") from error
    assert isinstance(rows, Dataset)
    return rows


def reason(error: BaseException) -> str:
    """One line of what began it: the datasets package wraps the parser's own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
