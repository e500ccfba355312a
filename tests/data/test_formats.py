"""``data.formats`` and ``data.turns``: rows of every format become the same conversation, and odd ones are named."""

import json
from typing import Any

import pytest

from jebi.data.conversation import Conversation, Turn
from jebi.data.formats import FORMATS, format_named, read_row, recognise
from jebi.errors import DataError

ASKED = (Turn("user", "2+2?"), Turn("assistant", "4"))
MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]


def read(row: dict[str, Any], roles: dict[str, str] | None = None) -> Conversation:
    return read_row(recognise(row), row, 7, roles or {})


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "2+2?", "input": "", "output": "4"}, "alpaca"),
        ({"instruction": "2+2?", "output": "4", "id": 3}, "alpaca"),
        ({"instruction": "2+2?", "output": "4", "input": None, "text": "ready"}, "alpaca"),
        ({"prompt": "2+2?", "completion": "4"}, "prompt_completion"),
        ({"messages": MESSAGES}, "messages"),
        ({"messages": json.dumps(MESSAGES)}, "messages"),
        ({"messages": [message | {"tool_calls": None, "name": None} for message in MESSAGES]}, "messages"),
        ({"conversations": SHAREGPT, "id": "x"}, "sharegpt"),
        ({"conversations": MESSAGES}, "sharegpt"),
        ({"messages": SHAREGPT}, "messages"),
    ],
)
def test_a_format_is_recognised_by_its_columns_and_read(row: dict[str, Any], form: str) -> None:
    assert recognise(row).name == form
    assert read(row) == Conversation(ASKED)


def test_ready_texts_are_a_format_only_where_no_other_is() -> None:
    assert recognise(["text", "id"]).name == "text"
    assert recognise(["text", "messages"]).name == "messages"


def test_alpaca_keeps_input_apart_and_reads_system_and_history() -> None:
    row = {"instruction": "c", "input": "x", "output": "d", "system": "s", "history": [["a", "b"]]}
    made = read(row)
    assert [turn.role for turn in made.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert made.turns[3] == Turn("user", "c", "x")
    assert made.turns[3].message() == {"role": "user", "content": "c\nx"}


def test_prompt_and_completion_may_be_messages_and_the_prompts_answers_are_given() -> None:
    made = read({"prompt": [*MESSAGES, {"role": "user", "content": "sure?"}], "completion": [MESSAGES[1]]})
    assert [turn.given for turn in made.turns] == [False, True, False, False]


def test_tool_calls_come_in_three_writings() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tool = {"name": "add", "parameters": {}}
    sharegpt = [
        SHAREGPT[0],
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        SHAREGPT[1],
    ]
    openai = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "3"},
        MESSAGES[1],
    ]
    parts = [
        MESSAGES[0],
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
        {"role": "tool", "content": [{"type": "text", "value": "3"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
    expected = (ASKED[0], Turn("assistant", "", tool_calls=(call,)), Turn("tool", "3"), ASKED[1])
    for row in (
        {"conversations": sharegpt, "tools": json.dumps([tool])},
        {"messages": openai, "tools": [{"type": "function", "function": tool}]},
        {"messages": parts, "tools": [tool]},
    ):
        assert read(row) == Conversation(expected, ({"type": "function", "function": tool},))


def test_reasoning_is_kept_apart() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "4"}]
    for answer in ({"role": "assistant", "content": parts}, MESSAGES[1] | {"reasoning_content": "hm"}):
        assert read({"messages": [MESSAGES[0], answer]}).turns[1] == Turn("assistant", "4", reasoning="hm")


@pytest.mark.parametrize("role", ["GPT", " assistant ", "ChatGPT", "bing", "bard", "model"])
def test_odd_names_of_the_model_are_known(role: str) -> None:
    assert read({"conversations": [SHAREGPT[0], {"from": role, "value": "4"}]}) == Conversation(ASKED)


def test_a_role_that_is_not_known_is_named_and_may_be_given_a_meaning() -> None:
    row = {"conversations": [SHAREGPT[0], {"from": "narrator", "value": "4"}]}
    with pytest.raises(DataError, match=r"row 7 \(counted from 0\): turn 1 has role 'narrator', which is not known"):
        read(row)
    assert read(row, {"Narrator": "assistant"}) == Conversation(ASKED)


def test_weights_of_rows_and_of_answers_are_read() -> None:
    made = read({"messages": [MESSAGES[0] | {"loss_weight": 0.0}, MESSAGES[1] | {"weight": 0.5}], "weight": 2})
    assert (made.turns[1].weight, made.weight) == (0.5, 2.0)
    assert read({"messages": [MESSAGES[0], MESSAGES[1] | {"train": False}]}).turns[1].weight == 0.0


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"conversations": []}, "the conversation is empty"),
    ({"conversations": None}, "the conversation is empty"),
    ({"messages": [{"content": "a"}]}, "turn 0 has no role"),
    ({"messages": ["a"]}, "turn 0 must be an object with role and content, not 'a'"),
    ({"messages": [{"role": "user"}]}, r"turn 0 \(user\) says nothing"),
    ({"messages": [{"role": "user", "content": 3}]}, "turn 0 has 3 for content, which is no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 0 has a part of type 'image'"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}, "only the model does"),
    ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "only answers are weighed"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": -1}]}, "turn 0 has weight -1; it must be"),
    ({"messages": MESSAGES, "weight": "much"}, "column 'weight' has weight 'much'"),
    ({"messages": "[{"}, "the conversation is no JSON"),
    ({"messages": MESSAGES, "tools": "[{"}, "tools is no JSON"),
    ({"messages": MESSAGES, "tools": [3]}, "a tool must be an object with a name, not 3"),
    ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "a tool call is no JSON"),
    ({"conversations": [{"from": "function_call", "value": '{"arguments": {}}'}]}, "object with name and arguments"),
    ({"instruction": "a", "output": None}, "column 'output' has nothing in it"),
    ({"instruction": 3, "output": "a"}, "column 'instruction' holds 3, which is no text"),
    ({"instruction": "a", "output": "b", "history": ["x"]}, "column 'history' must hold pairs"),
    ({"prompt": "a", "completion": MESSAGES}, "must both hold texts, or both lists of messages"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_a_row_that_cannot_be_read_is_named_with_what_is_wrong(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"row 7 \(counted from 0\): .*{message}"):
        read(row)


def test_columns_of_no_format_are_listed_with_the_formats_there_are() -> None:
    with pytest.raises(DataError, match=r"no format has the columns question, answer\. Recognised are: text \(text\)"):
        recognise(["question", "answer"])


def test_columns_of_two_formats_have_to_be_decided_on() -> None:
    with pytest.raises(DataError, match=r"fit several formats, alpaca and messages .*say which with data.format"):
        recognise(["instruction", "output", "messages"])
    assert format_named("messages", ["instruction", "output", "messages"]).name == "messages"


@pytest.mark.parametrize("column", ["chosen", "label", "images"])
def test_rows_for_another_task_are_not_learnt_by_mistake(column: str) -> None:
    with pytest.raises(DataError, match=rf"column '{column}' .*set data.format: messages to learn every answer"):
        recognise(["messages", column])
    assert format_named("messages", ["messages", column]).name == "messages"


def test_a_format_that_is_named_needs_its_columns() -> None:
    with pytest.raises(DataError, match=r"data\.format alpaca needs column 'output'; there are: instruction"):
        format_named("alpaca", ["instruction"])
    with pytest.raises(DataError, match=r"data\.format 'chatml' is not known\. Recognised are"):
        format_named("chatml", ["messages"])


def test_nulls_that_arrow_adds_are_no_arguments() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    turn = read({"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}).turns[1]
    assert turn.tool_calls[0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize("form", ["call", "arguments", "conversation"])
def test_nulls_that_a_row_spells_are_kept(form: str) -> None:
    given: Any = {"b": None}
    call: dict[str, Any] = {"name": "f", "arguments": json.dumps(given) if form == "arguments" else given}
    turn: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
    if form == "call":
        turn = {"role": "function_call", "content": json.dumps(call)}
    messages: Any = [{"role": "user", "content": "q"}, turn]
    tools = json.dumps([{"name": "f", "parameters": {"b": {"default": None}}}])
    row = {"messages": json.dumps(messages) if form == "conversation" else messages, "tools": tools}
    read = read_row(FORMATS["messages"], row, 0, {})
    assert read.turns[1].tool_calls[0]["function"]["arguments"] == given
    assert read.tools[0]["function"]["parameters"] == {"b": {"default": None}}


def test_every_format_has_a_default_template() -> None:
    from jebi.data.templates import DEFAULTS

    assert set(DEFAULTS) == {form.name for form in FORMATS.values() if form.read is not None}
