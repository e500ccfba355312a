"""``data.texts``: every text and every answer of raw rows is found, in structs, in JSON and in JSON as text."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from jebi.data.mojibake import repair
from jebi.data.rows import Rows
from jebi.data.sources import load_rows
from jebi.data.streams import stream_rows
from jebi.data.text_faults import text_faults
from jebi.data.texts import answers, as_table, leaves

TALKS: list[Any] = [
    [{"role": "user", "content": "cafÃ©s Ã©"}, {"role": "assistant", "content": "\ufffd"}],
    [{"role": "user", "content": "</s>"}, {"role": "assistant", "content": " "}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
]


def table_of(form: str, folder: Path) -> pa.Table:
    """The talks as a table, in one of the forms in which they may come."""
    if form == "struct":
        return pa.Table.from_pylist([{"messages": talk} for talk in TALKS])
    if form == "text":
        return pa.Table.from_pylist([{"messages": json.dumps(talk)} for talk in TALKS])
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS))
    return load_rows(str(folder / "talks.jsonl")).with_format("arrow")[:]


@pytest.mark.parametrize("form", ["struct", "text", "file"])
def test_every_text_and_every_answer_is_found(form: str, tmp_path: Path) -> None:
    table = table_of(form, tmp_path)
    texts = [pair for leaf in leaves(table) for pair in zip(leaf.values.to_pylist(), leaf.rows.tolist())]
    assert {("cafÃ©s Ã©", 0), ("\ufffd", 0), ("</s>", 1), ("f", 3)} <= set(texts)
    said = [pair for leaf in answers(table) for pair in zip(leaf.values.to_pylist(), leaf.rows.tolist())]
    assert said == [("\ufffd", 0), (" ", 1), ("a", 2)]


@pytest.mark.parametrize("form", ["struct", "text", "file"])
def test_faults_are_found_in_every_form(form: str, tmp_path: Path) -> None:
    found = text_faults(table_of(form, tmp_path), ("</s>",), "text")
    assert {code: rows.tolist() for code, rows in found.items()} == {
        "mojibake": [0],
        "lost-characters": [0],
        "special-in-text": [1],
        "empty-answers": [1],
    }


def test_a_text_column_that_holds_no_conversation_is_text() -> None:
    (leaf,) = leaves(pa.Table.from_pylist([{"messages": "hello"}, {"messages": None}]))
    assert leaf.values.to_pylist() == ["hello", None]


def test_streamed_rows_of_many_kinds_become_a_table() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "</s>"}]}, {"role": "assistant", "content": ""}]
    rows = [{"messages": TALKS[0], "n": 1}, {"messages": parts, "n": "Ã©tÃ©"}]
    found = text_faults(as_table(rows), ("</s>",), None)
    assert {code: hit.tolist() for code, hit in found.items()} == {
        "mojibake": [0, 1],
        "lost-characters": [0],
        "special-in-text": [1],
        "empty-answers": [1],
    }


@pytest.mark.parametrize("form", ["text", "file", "stream"])
def test_rows_are_repaired_and_keep_their_objects(form: str, tmp_path: Path) -> None:
    table_of("file", tmp_path)
    if form == "text":
        rows: Rows = Dataset.from_list([{"messages": json.dumps(talk)} for talk in TALKS])
    else:
        rows = (load_rows if form == "file" else stream_rows)(str(tmp_path / "talks.jsonl"))
    fixed, count = repair(rows)
    assert count == (0 if form == "stream" else 1), "a stream's are not counted"
    talks = [json.loads(row["messages"]) if form == "text" else row["messages"] for row in fixed]
    assert talks[0] == [{"role": "user", "content": "cafés é"}, TALKS[0][1]]
    assert talks[1:] == TALKS[1:], "no object gains another's members"
