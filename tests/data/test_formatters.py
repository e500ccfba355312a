"""``data.formatters``: a function or a Jinja text of the user's makes known rows of unknown ones."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from jebi.data.formats import read_row, recognise
from jebi.data.formatters import apply_formatter, load_formatter
from jebi.errors import ConfigError, DataError

FUNCTIONS = """
def text(row):
    return row["q"] + row["a"]

def messages(row):
    calls = [{"function": {"name": "f", "arguments": {row["q"]: 1}}}]
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"], "tool_calls": calls}]

def columns(row):
    return {"prompt": row["q"], "completion": row["a"], "weight": 0.5}

def number(row):
    return 3

def mixed(row):
    return {"text": "one"} if row["q"] == "one" else {"prompt": "two", "completion": "2"}

def kinds(row):
    return {"text": "one" if row["q"] == "one" else ["two"]}

def broken(row):
    return row["nowhere"]
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    return str(tmp_path / "own.py")


def made(spec: str, tokenizer: PreTrainedTokenizerFast, stream: bool = False) -> list[dict[str, Any]]:
    rows: Any = Dataset.from_dict({"q": ["one", "two"], "a": ["1", "2"]})
    return list(apply_formatter(rows.to_iterable_dataset() if stream else rows, load_formatter(spec, tokenizer)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_function_may_give_a_text_messages_or_columns(
    stream: bool, path: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert made(f"{path}:text", tokenizer, stream) == [{"text": "one1"}, {"text": "two2"}]
    assert made(f"{path}:columns", tokenizer, stream)[1] == {"prompt": "two", "completion": "2", "weight": 0.5}
    row = made(f"{path}:messages", tokenizer, stream)[0]
    turn = read_row(recognise(row), row, 0, {}).turns[1]
    assert (turn.content, turn.tool_calls[0]["function"]["arguments"]) == ("1", {"one": 1})


def test_a_jinja_text_has_the_columns_and_the_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert made("Q: {{ q }}\nA: {{ a }}{{ eos_token }}", tokenizer)[0] == {"text": "Q: one\nA: 1</s>"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py:text", "there is no file 'none.py'"),
        ("{path}:nothing", "own.py' has no function 'nothing'"),
        ("just words", "must be file.py:function, or a Jinja text with {{ column }}"),
        ("{{% if %}}", "data.formatter is no Jinja"),
        ("{path}x.py:f", r"own.pyx.py' cannot be run: SyntaxError"),
        ("{path}y.py:f", r"own.pyy.py' cannot be run: ModuleNotFoundError: No module named 'nowhere_'"),
    ],
)
def test_a_formatter_that_is_not_there_is_told(
    spec: str, message: str, path: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    Path(f"{path}x.py").write_text("def f(row:\n")
    Path(f"{path}y.py").write_text("import nowhere_\n")
    with pytest.raises(ConfigError, match=message):
        load_formatter(spec.format(path=path) if "{" in spec else spec, tokenizer)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{path}:broken", r"row 0 \(counted from 0\): data.formatter failed: KeyError: 'nowhere'"),
        ("{path}:number", r"row 0 \(counted from 0\): data.formatter must give a text, a list of messages or columns"),
        ("{path}:mixed", r"row 1 .*: data.formatter gives columns prompt, completion where it gave text before"),
        ("{path}:kinds", r"row 1 .*: data.formatter gives a list in column 'text' where it gave a str before"),
        ("{{{{ b }}}}", r"row 0 \(counted from 0\): data.formatter failed: UndefinedError: 'b' is undefined"),
    ],
)
def test_a_formatter_that_fails_names_the_row(
    spec: str, message: str, path: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=message):
        made(spec.format(path=path), tokenizer)
