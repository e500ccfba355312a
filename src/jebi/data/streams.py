"""Rows that are read while they are trained on: a stream never holds the whole set.

Lines of .jsonl and .csv files are read one by one, .parquet files and hub data sets by the datasets package.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from jebi.data.records import Read, csv_records, jsonl_records
from jebi.data.sources import SUFFIXES, UNREADABLE, files_of, reason
from jebi.errors import DataError


def stream_rows(source: str, split: str = "train") -> IterableDataset:
    """The rows of a .jsonl, .csv or .parquet file, of a folder of one kind of them, or of a hub data set.

    Raises:
        DataError: nothing there, or a kind of file that cannot be read in pieces. A broken line is one when it is met.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = files_of(path)
    elif path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"data file '{path}' does not exist.")
        files = [path]
    elif source.count("/") == 1:
        return _load(source, split=split)
    else:
        raise DataError(
            f"'{source}' is no .jsonl, .csv or .parquet file, no folder of them and no hub id (owner/name)."
        )
    kinds = {file.suffix for file in files}
    if len(kinds) > 1 or kinds == {".json"}:
        raise DataError(f"'{source}' cannot be streamed: write its rows as .jsonl, one object a line.")
    if kinds == {".parquet"}:
        return _load("parquet", data_files=[str(file) for file in files], split="train")
    read = jsonl_records if kinds == {".jsonl"} else csv_records
    stream = IterableDataset.from_generator(_all, gen_kwargs={"read": read, "files": [str(file) for file in files]})
    assert isinstance(stream, IterableDataset)
    return stream


def _load(*args: Any, **kwargs: Any) -> IterableDataset:
    try:
        stream = load_dataset(*args, streaming=True, **kwargs)
    except UNREADABLE as error:
        raise DataError(f"'{args[0]}' cannot be streamed: {reason(error)}") from error
    assert isinstance(stream, IterableDataset)
    return stream


def _all(read: Read, files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from read(Path(file), _lines(file))


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8; save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from error
