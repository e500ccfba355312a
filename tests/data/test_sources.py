"""``data.sources``: every form of file is read alike, and every fault of one is a `DataError` naming file and place."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from jebi.data.sources import load_rows, require_columns
from jebi.errors import DataError

ROWS = [
    {"instruction": "더하기", "input": "1, 2", "output": "3"},
    {"instruction": "hello", "input": "", "output": "안녕 \u2028 같은 줄"},
]
LINES = (
    '{"instruction": "더하기", "input": "1, 2", "output": "3"}\n'
    '{"instruction": "hello", "input": "", "output": "안녕 \u2028 같은 줄"}\n'
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "rows.jsonl", LINES)).to_list() == ROWS


@pytest.mark.parametrize("content", [LINES.replace("\n", "\n\n"), LINES.rstrip("\n"), LINES.replace("\n", "\r\n")])
def test_jsonl_may_have_empty_lines_no_last_newline_and_windows_line_ends(tmp_path: Path, content: str) -> None:
    assert load_rows(write(tmp_path / "rows.jsonl", content)).to_list() == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    content = {"rows.jsonl": '{"text": "a"}\n', "rows.json": '[{"text": "a"}]', "rows.csv": "text\na\n"}[name]
    assert load_rows(write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())).to_list() == [{"text": "a"}]


def test_json_holds_a_list(tmp_path: Path) -> None:
    content = f"[\n{','.join(LINES.splitlines(keepends=False)[:1])}\n]"
    assert load_rows(write(tmp_path / "rows.json", content)).to_list() == ROWS[:1]


def test_csv_and_parquet_are_read_alike(tmp_path: Path) -> None:
    table = Dataset.from_list(ROWS[:1])
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.csv")).to_list() == ROWS[:1]
    assert load_rows(str(tmp_path / "rows.parquet")).to_list() == ROWS[:1]


def test_a_parquet_file_that_changed_within_its_time_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    read = []
    for text in ("a", "b"):
        Dataset.from_list([{"text": text}]).to_parquet(path)
        os.utime(path, (1, 1))
        read.append(load_rows(str(path))[0]["text"])
    assert read == ["a", "b"]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", LINES)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/rows.jsonl")) == 2


FAULTS: list[tuple[str, Any, str]] = [
    ("rows.jsonl", '{"a": 1}\n{"a": 1,}\n', r"rows.jsonl' line 2: invalid JSON: .* at column 9"),
    ("rows.jsonl", '{"a": 1}\n\n{"a": \n', r"line 3: invalid JSON"),
    ("rows.jsonl", '{"a": 1}\n["b"]\n', r"line 2: a row must be an object with columns, not \['b'\]"),
    ("rows.jsonl", '{"a": "x"}\n'.encode("utf-16"), r"rows.jsonl' is not UTF-8 \(byte 0\); save it as UTF-8"),
    ("rows.jsonl", b'{"a": "\xb0\xa1"}\n', r"is not UTF-8 \(byte 7\)"),
    ("rows.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n', r"row 2 lacks column 'b', which other rows have"),
    ("rows.jsonl", '{"a": 1}\n{"a": "x"}\n', r"rows.jsonl': column 'a' holds int and str"),
    ("rows.jsonl", "", r"rows.jsonl' holds no rows"),
    ("rows.jsonl", "\n\n", r"rows.jsonl' holds no rows"),
    ("rows.json", '[\n{"a": 1},\n{"a"}\n]', r"rows.json' line 3: invalid JSON"),
    ("rows.json", '{"a": 1}', r"rows.json' must hold a list of objects"),
    ("rows.json", "[1, 2]", r"rows.json' must hold a list of objects"),
    ("rows.json", "[]", r"rows.json' holds no rows"),
    ("rows.csv", "a,b\n1,2\n1,2,3\n", r"rows.csv' line 3: 3 values, but the first line names 2"),
    ("rows.csv", 'a,b\n"1\n1",2\n3\n', r"rows.csv' line 4: 1 values, but the first line names 2"),
    ("rows.csv", 'a,b\n"1,2\n', r"rows.csv' line [34]: unexpected end of data"),
    ("rows.csv", "a,a\n1,2\n", r"rows.csv' names a column twice: a, a"),
    ("rows.csv", b"a\n\xff\n", r"rows.csv' is not UTF-8 \(byte 2\)"),
    ("rows.csv", "", r"rows.csv' holds no rows"),
    ("rows.csv", "a,b\n", r"rows.csv' holds no rows"),
    ("rows.parquet", b"PAR1 this is none", r"rows.parquet' cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS)
def test_a_fault_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_rows(write(tmp_path / name, content))
    assert "\n" not in str(caught.value), "one line, as the command prints it"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file '.*nowhere.jsonl' does not exist"):
        load_rows(str(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("source", ["rows.txt", "folder/deeper/rows", "just-a-word"])
def test_what_is_neither_file_nor_hub_id_is_refused_without_asking_the_hub(source: str) -> None:
    with pytest.raises(DataError, match="no hub id"):
        load_rows(source)


def test_a_folder_without_data_files_is_told(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "nothing")
    with pytest.raises(DataError, match=r"folder '.*' holds no \.jsonl, \.json, \.csv or \.parquet file"):
        load_rows(str(tmp_path))


def test_a_hub_data_set_that_cannot_be_had_is_named_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub")

    monkeypatch.setattr("jebi.data.sources.load_dataset", offline)
    with pytest.raises(DataError, match="data set 'owner/name', split 'test', cannot be loaded"):
        load_rows("owner/name", "test")


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(DataError, match=r"'rows.jsonl' has no column 'output'. It has: instruction, input\."):
        require_columns(
            Dataset.from_dict({"instruction": ["a"], "input": ["b"]}), ("instruction", "output"), "rows.jsonl"
        )


def test_csv_cells_are_texts(tmp_path: Path) -> None:
    content = 'text,more\n007,None\n"a ""b"",\nc",\n'
    assert load_rows(write(tmp_path / "rows.csv", content)).to_list() == [
        {"text": "007", "more": "None"},
        {"text": 'a "b",\nc', "more": ""},
    ]


def test_a_missing_input_is_fine_but_a_missing_answer_is_named_by_its_row(tmp_path: Path) -> None:
    content = '{"instruction": "a", "input": null, "output": "b"}\n{"instruction": "c", "input": "", "output": null}\n'
    rows = load_rows(write(tmp_path / "rows.jsonl", content))
    require_columns(rows.select([0]), ("instruction", "input", "output"), "rows.jsonl")
    with pytest.raises(DataError, match=r"'rows.jsonl' row 2 has nothing in column 'output'"):
        require_columns(rows, ("instruction", "input", "output"), "rows.jsonl")
