"""``data.cache``: tokens made once are taken again for the same rows and settings, and for no others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from jebi.data import cache, encoding
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize

Make = Callable[[bool], PreTrainedTokenizerFast]

HOW = Preparation(100, text_field=None)


def rows(last: str = "x", weight: float = 1.0) -> Dataset:
    count = cache.FEWEST_ROWS
    return Dataset.from_dict(
        {
            "prompt": [f"{n}" for n in range(count)],
            "completion": ["a"] * (count - 1) + [last],
            "weight": [1.0] * (count - 1) + [weight],
        }
    )


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were encoded, batch by batch."""
    counted: list[int] = []
    encode = encoding.Encoder.encode

    def counting(self: Any, written: Any) -> Any:
        counted.append(len(written))
        return encode(self, written)

    monkeypatch.setattr(encoding.Encoder, "encode", counting)
    return counted


def test_the_same_rows_and_settings_are_tokenised_once(byte_tokenizer: Make, encoded: list[int]) -> None:
    first = tokenize(rows(), byte_tokenizer(False), HOW)
    assert sum(encoded) == cache.FEWEST_ROWS
    tokenizer = byte_tokenizer(False)
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=7)  # leaves its mark on the tokenizer
    again = tokenize(rows(), tokenizer, replace(HOW, workers=3))
    assert sum(encoded) == cache.FEWEST_ROWS, "taken from the cache"
    assert again.to_list() == first.to_list()


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a row": ({"last": "y"}, {}),
    "a weight": ({"weight": 0.5}, {}),
    "max length": ({}, {"max_length": 99}),
    "learn": ({}, {"learn": "all"}),
    "template": ({}, {"template": "{instruction} {output}"}),
    "special tokens": ({}, {"special_tokens": "error"}),
    "roles": ({}, {"roles": {"x": "user"}}),
    "first row": ({}, {"first_row": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str, byte_tokenizer: Make, encoded: list[int]) -> None:
    given, settings = CHANGES[change]
    tokenize(rows(), byte_tokenizer(False), HOW)
    tokenize(rows(**given), byte_tokenizer(False), replace(HOW, **settings))
    assert sum(encoded) == 2 * cache.FEWEST_ROWS


def test_a_change_of_the_tokenizer_is_noticed(byte_tokenizer: Make, encoded: list[int]) -> None:
    tokenize(rows(), byte_tokenizer(False), HOW)
    tokenize(rows(), byte_tokenizer(True), HOW)
    other = byte_tokenizer(False)
    other.eos_token = "<pad>"
    tokenize(rows(), other, HOW)
    grown = byte_tokenizer(False)
    grown.add_tokens(["99"])
    tokenize(rows(), grown, HOW)
    torn = byte_tokenizer(False)
    torn.split_special_tokens = True
    tokenize(rows(), torn, HOW)
    assert sum(encoded) == 5 * cache.FEWEST_ROWS


def test_a_change_of_the_chat_template_is_noticed(byte_tokenizer: Make, encoded: list[int]) -> None:
    for template in ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", "{{ messages[0].content }}</s>b</s>"):
        tokenizer = byte_tokenizer(False)
        tokenizer.chat_template = template
        tokenize(rows(), tokenizer, replace(HOW, template="chat", learn="all"))
    assert sum(encoded) == 2 * cache.FEWEST_ROWS


def test_what_a_function_makes_is_never_taken_from_the_cache(byte_tokenizer: Make, encoded: list[int]) -> None:
    """It may read what it likes: here a list that changes between two calls."""
    words = ["one"]

    def text(row: dict[str, Any]) -> str:
        return words[0]

    how = replace(HOW, formatting_func=text)
    first = tokenize(rows(), byte_tokenizer(False), how)
    words[0] = "two"
    second = tokenize(rows(), byte_tokenizer(False), how)
    assert first[0]["input_ids"] != second[0]["input_ids"]


def test_few_rows_leave_no_file(byte_tokenizer: Make, tmp_path: Any) -> None:
    tokenize(rows().select(range(10)), byte_tokenizer(False), HOW)
    assert not list(tmp_path.rglob("*.arrow"))
    tokenize(rows(), byte_tokenizer(False), HOW)
    assert len(list(tmp_path.rglob("jebi/*.arrow"))) == 1
