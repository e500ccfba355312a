"""Which format a data set has, told by its columns, and a row of each format as a `Conversation`.

    text                 text
    alpaca               instruction, output; perhaps input, system, history
    prompt_completion    prompt, completion: texts, or lists of messages
    messages             messages; perhaps tools
    sharegpt             conversations; perhaps system, tools

Turns themselves are read by `data.turns`; a column ``weight`` says how much a row counts in the loss.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jebi.data.conversation import Conversation, Turn
from jebi.data.turns import read_tools, read_turns, read_weight
from jebi.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A way of writing rows."""

    name: str
    """What ``data.format`` calls it."""
    needs: tuple[str, ...]
    """Columns by which it is recognised."""
    optional: tuple[str, ...]
    """Columns that it reads where they are there."""
    read: Callable[[Row, Mapping[str, str]], Conversation] | None
    """A row and the user's own roles to turns; None where rows are ready texts."""
    weighs_turns: bool = False
    """Whether a turn may carry a weight of its own."""


def _alpaca(row: Row, roles: Mapping[str, str]) -> Conversation:
    turns = _system(row)
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"column 'history' must hold pairs of question and answer, not {pair!r:.60}.")
        turns += [Turn("user", _text(pair[0], "history")), Turn("assistant", _text(pair[1], "history"))]
    asked = Turn("user", _text(row.get("instruction"), "instruction"), _text(row.get("input") or "", "input"))
    return Conversation((*turns, asked, Turn("assistant", _text(row.get("output"), "output"))))


def _prompt_completion(row: Row, roles: Mapping[str, str]) -> Conversation:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation((Turn("user", prompt), Turn("assistant", completion)), read_tools(row.get("tools")))
    if isinstance(prompt, str) or isinstance(completion, str) or prompt is None or completion is None:
        raise DataError("columns 'prompt' and 'completion' must both hold texts, or both lists of messages.")
    asked, answered = read_turns(prompt, roles), read_turns(completion, roles)
    given = tuple(replace(turn, given=turn.role == "assistant") for turn in asked)
    return Conversation((*given, *answered), read_tools(row.get("tools")))


def _messages(row: Row, roles: Mapping[str, str]) -> Conversation:
    return Conversation(read_turns(row.get("messages"), roles), read_tools(row.get("tools")))


def _sharegpt(row: Row, roles: Mapping[str, str]) -> Conversation:
    turns = read_turns(row.get("conversations"), roles)
    system = _system(row) if turns[0].role != "system" else []
    return Conversation((*system, *turns), read_tools(row.get("tools")))


FORMATS = {
    form.name: form
    for form in (
        Format("text", ("text",), (), None),
        Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _alpaca),
        Format("prompt_completion", ("prompt", "completion"), ("tools",), _prompt_completion, weighs_turns=True),
        Format("messages", ("messages",), ("tools",), _messages, weighs_turns=True),
        Format("sharegpt", ("conversations",), ("system", "tools"), _sharegpt, weighs_turns=True),
    )
}

_OTHER_TASKS = {
    "chosen": "holds better and worse answers side by side, which is preference data",
    "rejected": "holds better and worse answers side by side, which is preference data",
    "label": "says which answers are good, and the bad ones would be learnt as well",
    "kto_tag": "says which answers are good, and the bad ones would be learnt as well",
    "images": "holds pictures, which a language model does not see",
    "videos": "holds films, which a language model does not see",
    "audios": "holds sound, which a language model does not hear",
}
"""Columns that say the rows are for something else than learning every answer."""


def recognise(columns: Iterable[str]) -> Format:
    """The format whose columns are there; ready texts only where no other format is.

    Raises:
        DataError: no format's columns are there, or several formats', or the rows are for another task.
    """
    there = list(columns)
    found = [form for form in FORMATS.values() if set(form.needs) <= set(there)]
    structured = [form for form in found if form.read is not None]
    if len(structured) > 1:
        raise DataError(
            f"the columns fit several formats, {' and '.join(form.name for form in structured)} "
            f"(there are: {', '.join(there)}): say which with data.format."
        )
    if not found:
        raise DataError(f"no format has the columns {', '.join(there) or '(none)'}. {known()}")
    chosen = (structured or found)[0]
    for column, reason in _OTHER_TASKS.items():
        if column in there and chosen.read is not None:
            raise DataError(
                f"column '{column}' {reason}. Drop the column, or set data.format: {chosen.name} to learn every answer."
            )
    return chosen


def format_named(name: str, columns: Iterable[str]) -> Format:
    """The format of that name; its columns must be there."""
    if name not in FORMATS:
        raise DataError(f"data.format '{name}' is not known. {known()}")
    there = list(columns)
    for column in FORMATS[name].needs:
        if column not in there:
            raise DataError(f"data.format {name} needs column '{column}'; there are: {', '.join(there) or '(none)'}.")
    return FORMATS[name]


def known() -> str:
    """One line on what is recognised."""
    return "Recognised are: " + "; ".join(f"{form.name} ({', '.join(form.needs)})" for form in FORMATS.values()) + "."


def read_row(form: Format, row: Row, number: int, roles: Mapping[str, str]) -> Conversation:
    """A row as a conversation.

    Args:
        form: a format that has turns.
        row: its columns.
        number: which row it is, counted from 0, for messages.
        roles: roles of the user's own.

    Raises:
        DataError: the row is not what its format says; the message names it.
    """
    assert form.read is not None, "ready texts are no conversation"
    try:
        made = form.read(row, roles)
        weight = row.get("weight")
        return made if weight is None else replace(made, weight=read_weight(weight, "column 'weight'"))
    except DataError as error:
        raise DataError(f"{at(number)}: {error}") from error


def at(number: int) -> str:
    """How a row is named in messages."""
    return f"row {number} (counted from 0)"


def _system(row: Row) -> list[Turn]:
    return [Turn("system", _text(row["system"], "system"))] if row.get("system") else []


def _text(value: Any, column: str) -> str:
    if value is None:
        raise DataError(f"column '{column}' has nothing in it; fill it in or drop the row.")
    if not isinstance(value, str):
        raise DataError(f"column '{column}' holds {value!r:.40}, which is no text; put it in quotes.")
    return value
