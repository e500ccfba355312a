"""``data.streams``: files read piece by piece give the rows that files read whole give, and name their faults."""

from pathlib import Path

import pytest
from datasets import Dataset

from jebi.data.sources import load_rows
from jebi.data.streams import stream_rows
from jebi.errors import DataError

ROWS = [{"instruction": "더하기", "output": "3"}, {"instruction": "hello", "output": "안녕 \u2028 같은 줄"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_stream_has_the_files_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    table = Dataset.from_list(ROWS)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    assert list(stream_rows(str(path))) == load_rows(str(path)).to_list() == ROWS
    table.select([1]).to_json(tmp_path / "more.jsonl")
    if kind == "jsonl":
        assert list(stream_rows(str(tmp_path))) == load_rows(str(tmp_path)).to_list() == [ROWS[1], *ROWS]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_line_ends_of_windows_are_read_alike(name: str, tmp_path: Path) -> None:
    content = {"rows.csv": 'a,b\r\n1,"two\r\nlines"\r\n', "rows.jsonl": '{"a": "1", "b": "two\\nlines"}\r\n'}[name]
    (tmp_path / name).write_bytes(content.encode())
    path = str(tmp_path / name)
    assert list(stream_rows(path)) == load_rows(path).to_list() == [{"a": "1", "b": "two\nlines"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": 1,}\n', r"rows.jsonl' line 2: invalid JSON: .* at column 9"),
        ("rows.jsonl", b'{"a": 1}\n["b"]\n', r"line 2: a row must be an object with columns"),
        ("rows.jsonl", b'{"a": "\xb0\xa1"}\n', r"rows.jsonl' is not UTF-8"),
        ("rows.csv", b"a,b\n1,2\n3\n", r"rows.csv' line 3: 1 values, but the first line names 2"),
        ("rows.csv", b'a,b\n1,"2\n', r"rows.csv' line \d: unexpected end of data"),
        ("rows.csv", b"a,a\n1,2\n", r"rows.csv' names a column twice: a, a"),
        ("rows.json", b'[{"a": 1}]', r"cannot be streamed: write its rows as .jsonl"),
        ("rows.txt", b"", r"is no .jsonl, .csv or .parquet file"),
    ],
)
def test_a_fault_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(stream_rows(str(tmp_path / name)))
    with pytest.raises(DataError, match="does not exist"):
        stream_rows(str(tmp_path / "none.jsonl"))
