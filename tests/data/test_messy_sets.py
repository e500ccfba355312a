"""Data sets as people write them: they load as they are, and what is odd in them is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from jebi.data.formats import read_row, recognise
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize
from jebi.data.sources import load_rows
from jebi.errors import DataError

Real = Callable[[str], PreTrainedTokenizerBase]

FORMATS = {
    "alpaca_en_demo.json": ("alpaca", 999),
    "alpaca_zh_demo.json": ("alpaca", 1000),
    "identity.json": ("alpaca", 91),
    "c4_demo.jsonl": ("text", 300),
    "glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "glaive_toolcall_zh_demo.json": ("sharegpt", 300),
    "reason_tool_use_demo_50.jsonl": ("messages", 50),
    "v1_sft_demo.jsonl": ("messages", 500),
}


@pytest.mark.parametrize("name", FORMATS)
def test_demo_sets_are_recognised_and_every_row_is_read(name: str, real_rows: Path) -> None:
    rows = load_rows(str(real_rows / name))
    form = recognise(rows.column_names)
    assert (form.name, len(rows)) == FORMATS[name]
    if form.read is not None:
        assert all(read_row(form, row, number, {}).answers for number, row in enumerate(rows))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpo_en_demo.json", "column 'chosen' holds better and worse answers side by side"),
        ("kto_en_demo.json", "column 'label' says which answers are good, and the bad ones would be learnt as well"),
        ("mllm_demo.json", "column 'images' holds pictures"),
    ],
)
def test_sets_for_another_task_are_refused_by_the_column_that_says_so(name: str, message: str, real_rows: Path) -> None:
    with pytest.raises(DataError, match=message):
        recognise(load_rows(str(real_rows / name)).column_names)


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl", "v1_sft_demo.jsonl"])
def test_conversations_with_calls_and_reasoning_become_rows(name: str, real_rows: Path, real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("qwen3")
    rows = load_rows(str(real_rows / name)).select(range(50))
    made = tokenize(rows, tokenizer, Preparation(100_000, text_field=None, learn="answers"))
    assert len(made) == 50
    form = recognise(rows.column_names)
    for row, given in zip(made, rows):
        assert row["labels"].count(tokenizer.eos_token_id) == len(read_row(form, given, 0, {}).answers)


def test_korean_questions_with_several_answers_become_rows(
    real_rows: Path, real_tokenizer: Real, tmp_path: Path
) -> None:
    """chatterbot's files hold a question and one or more answers to it."""
    import json

    pairs = [
        {"instruction": question, "output": answer}
        for file in sorted((real_rows / "korean").glob("*.yml"))
        for question, *answers in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        for answer in answers
    ]
    path = tmp_path / "korean.jsonl"
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    rows = load_rows(str(path))
    assert len(rows) == 696
    made = tokenize(rows, real_tokenizer("llama3_1"), Preparation(2048, text_field=None, learn="answers"))
    decoded = [real_tokenizer("llama3_1").decode([n for n in row["labels"] if n != -100]) for row in made]
    assert decoded == [f"{pair['output']}<|eot_id|>" for pair in pairs]
