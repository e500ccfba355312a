"""The texts of raw rows, wherever they stand: columns, messages in lists, fields of objects. As arrow arrays.

Objects come in two forms: as arrow's structs, and as JSON, which `data.sources` makes of files so that no object gains
the members of the others.

Shapes: N texts, R rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jebi.data.flat_rows import Ints
from jebi.data.turns import ROLES

_ANSWERS = ("output", "completion", "response", "answer")
_ROLES, _CONTENTS = ("role", "from"), ("content", "value")
TALK = ("messages", "conversations")
"""Columns that may hold a conversation as the text of its JSON."""
_ANSWERING = pa.array([name for name, role in ROLES.items() if role == "assistant"])


@dataclass(frozen=True)
class Leaf:
    """The texts that stand at one place of the rows."""

    column: str
    """The column they stand in."""
    values: Any
    """(N,) an arrow array of texts, some perhaps null."""
    rows: Ints
    """(N,) the row each belongs to."""


def as_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table: columns of one kind of plain values as that, all others as JSON."""
    columns = {}
    for column in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(column) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if len(kinds) > 1 or kinds & {dict, list}:
            written = pa.array(
                [None if value is None else json.dumps(value, default=str) for value in values], pa.string()
            )
            columns[column] = pa.ExtensionArray.from_storage(pa.json_(), written)
        else:
            columns[column] = pa.array(values)
    return pa.table(columns)


def leaves(table: pa.Table) -> Iterator[Leaf]:
    """Every text of a table."""
    for column in table.column_names:
        values = _whole(table[column])
        if (objects := _objects(column, values)) is not None:
            yield _leaf(column, ((text, row) for row, value in enumerate(objects) for text in _texts(value)))
            continue
        for texts, rows in _within(values, np.arange(table.num_rows)):
            yield Leaf(column, texts, rows)


def answers(table: pa.Table) -> Iterator[Leaf]:
    """The texts that are answers by the name of their column, or by the role they stand beside."""
    for column in table.column_names:
        values, rows = _whole(table[column]), np.arange(table.num_rows)
        if (objects := _objects(column, values)) is not None:
            yield _leaf(column, ((text, row) for row, value in enumerate(objects) for text in _answers_of(value)))
        elif _is_text(values.type) and column in _ANSWERS:
            yield Leaf(column, values, rows)
        elif _is_list(values.type) and pa.types.is_struct(values.type.value_type):
            messages, rows = values.flatten(), rows[pc.list_parent_indices(values).to_numpy()]
            yield from _said(column, messages, rows)


def _said(column: str, messages: Any, rows: Ints) -> Iterator[Leaf]:
    fields = dict(zip((field.name for field in messages.type), messages.flatten()))
    role = next((fields[name] for name in _ROLES if name in fields and _is_text(fields[name].type)), None)
    content = next((fields[name] for name in _CONTENTS if name in fields and _is_text(fields[name].type)), None)
    if role is not None and content is not None:
        answering = pc.is_in(role.cast(pa.string()), value_set=_ANSWERING)
        if "tool_calls" in fields:  # which are the answer then
            answering = pc.and_(answering, fields["tool_calls"].is_null())
        yield Leaf(column, content.filter(answering), rows[answering.to_numpy(zero_copy_only=False)])


def _within(values: Any, rows: Ints) -> Iterator[tuple[Any, Ints]]:
    if _is_text(values.type):
        yield values, rows
    elif _is_list(values.type):
        yield from _within(values.flatten(), rows[pc.list_parent_indices(values).to_numpy()])
    elif pa.types.is_struct(values.type):
        for part in values.flatten():
            yield from _within(part, rows)


def _objects(column: str, values: Any) -> list[Any] | None:
    """The values that a column holds as JSON; None where it holds none."""
    if getattr(values.type, "extension_name", None) == "arrow.json":
        return [None if text is None else json.loads(text) for text in values.storage.to_pylist()]
    if column not in TALK or not _is_text(values.type):
        return None
    try:
        return [None if text is None else json.loads(text) for text in values.to_pylist()]
    except json.JSONDecodeError:  # no conversation; who reads it as one says so
        return None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, however deep it stands."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _answers_of(messages: Any) -> Iterator[str | None]:
    """What the model says in a list of messages, but for its calls of tools."""
    for message in messages if isinstance(messages, list) else ():
        role = next((message[name] for name in _ROLES if name in message), None) if isinstance(message, dict) else None
        if isinstance(role, str) and ROLES.get(role) == "assistant" and not message.get("tool_calls"):
            content = next((message[name] for name in _CONTENTS if name in message), None)
            if content is None or isinstance(content, str):
                yield content


def _leaf(column: str, found: Iterable[tuple[str | None, int]]) -> Leaf:
    pairs = list(found)
    rows = np.array([row for _, row in pairs], np.int64)
    # A row that is skipped may hold half characters, which arrow does not take.
    texts = [text and text.encode("utf-8", "replace").decode() for text, _ in pairs]
    return Leaf(column, pa.array(texts, pa.string()), rows)


def _whole(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
