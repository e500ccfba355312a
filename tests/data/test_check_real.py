"""``data.check`` on real tokenizers and on data sets as people write them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from jebi.data.check import Contract, check_rows
from jebi.data.control_tokens import control_tokens
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize
from jebi.data.sources import load_rows

Real = Callable[[str], PreTrainedTokenizerBase]

LONGEST = 2048

ENDS = {"smollm2": "<|im_end|>", "llama3_1": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}


@pytest.fixture
def talk(real_rows: Path) -> Dataset:
    """91 short questions and answers with nothing wrong."""
    return load_rows(str(real_rows / "identity.json"))


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("learn", ["all", "answers", "last_answer"])
def test_conversations_in_the_tokenizers_own_template_are_clean(
    name: str, learn: str, talk: Dataset, real_tokenizer: Real
) -> None:
    tokenizer = real_tokenizer(name)
    rows = tokenize(talk, tokenizer, Preparation(LONGEST, template="chat", learn=learn))  # type: ignore[arg-type]
    assert check_rows(rows, tokenizer, Contract(LONGEST), [talk]).findings == ()


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_turn_and_opens_an_answer_is_read_off_the_template(name: str, real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer(name)
    control = control_tokens(tokenizer)
    assert tokenizer.convert_tokens_to_ids(ENDS[name]) in control.ends
    assert "assistant" in tokenizer.decode(control.opening) or "model" in tokenizer.decode(control.opening)


@pytest.mark.parametrize("name", ["llama3_1", "gemma3"])
def test_a_rendered_template_tokenised_with_bos_once_more(name: str, talk: Dataset, real_tokenizer: Real) -> None:
    """The fault of many scripts: the template writes BOS, and the tokenizer adds its own."""
    tokenizer = real_tokenizer(name)
    ids = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}],
                tokenize=False,
            )
        )["input_ids"]
        for row in talk
    ]
    report = check_rows(Dataset.from_dict({"input_ids": ids}), tokenizer, Contract(LONGEST))
    assert [(finding.code, finding.count, finding.stops) for finding in report.findings] == [("doubled-bos", 91, True)]


MESSY = {
    "alpaca_en_demo.json": {"duplicates": 14},
    "alpaca_zh_demo.json": {"duplicates": 8},
    "c4_demo.jsonl": {"missing-eos": 288, "template-mismatch": 300, "lost-characters": 4},
    "v1_sft_demo.jsonl": {"duplicates": 1},
}
"""What is found in LLaMA-Factory's demo sets, in Qwen 3's tokens and template; 12 rows of raw text are cut besides."""


@pytest.mark.parametrize("name", MESSY)
def test_what_is_found_in_demo_sets(name: str, real_rows: Path, real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("qwen3")
    given = load_rows(str(real_rows / name))
    template = None if "text" in given.column_names else "chat"
    rows = tokenize(given, tokenizer, Preparation(LONGEST, template=template))
    report = check_rows(rows, tokenizer, Contract(LONGEST), [given])
    assert {finding.code: finding.count for finding in report.findings} == MESSY[name]
