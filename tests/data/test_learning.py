"""What is learnt of rows of every format, and how much: answers with their ends, the last one, two kinds of weights."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from jebi.data.preparation import Preparation
from jebi.data.responses import ResponseParts
from jebi.data.rows import tokenize
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "이"},
]


def prepared(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[dict[str, Any]]:
    how = Preparation(**({"max_length": 1000, "text_field": None} | settings))
    return list(tokenize(Dataset.from_list(rows), tokenizer, how))


def learnt(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> str:
    """The learnt tokens' text, with a bar where tokens between them are not."""
    marked = [label if label != IGNORED else None for label in row["labels"]]
    text = ""
    for number, label in enumerate(marked):
        if label is not None:
            text += ("|" if number and marked[number - 1] is None and text else "") + chr(0) + str(label)
    runs = [[int(n) for n in run.split(chr(0)) if n] for run in text.split("|")]
    return "|".join(tokenizer.decode(run) for run in runs)


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ("auto", "<user>one</s>\n<assistant>1</s>\n<user>two</s>\n<assistant>이</s>\n"),
        ("all", "<user>one</s>\n<assistant>1</s>\n<user>two</s>\n<assistant>이</s>\n"),
        ("answers", "1</s>|이</s>"),
        ("last_answer", "이</s>"),
    ],
)
def test_what_is_learnt_of_a_conversation(learn: str, expected: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = prepared([{"messages": TALK}], tokenizer, template=JINJA, learn=learn)
    assert learnt(tokenizer, row) == expected
    assert tokenizer.decode(row["input_ids"]) == "<user>one</s>\n<assistant>1</s>\n<user>two</s>\n<assistant>이</s>\n"


def test_of_prompt_and_completion_the_completion_is_learnt_unless_all_is_asked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts, talk = {"prompt": "2+2=", "completion": "4"}, {"prompt": TALK[:3], "completion": TALK[3:]}
    assert learnt(tokenizer, *prepared([texts], tokenizer)) == "4</s>"
    assert learnt(tokenizer, *prepared([texts], tokenizer, learn="all")) == "2+2=4</s>"
    assert learnt(tokenizer, *prepared([talk], tokenizer, template=JINJA)) == "이</s>", "the first answer is given"
    assert learnt(tokenizer, *prepared([talk], tokenizer, template=JINJA, learn="all")).startswith("<user>one")


def test_alpaca_rows_take_the_tutorials_template_or_the_one_named(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "더해", "input": "1,2", "output": "3"}
    assert "### instruction:\n더해" in learnt(tokenizer, *prepared([row], tokenizer))
    assert learnt(tokenizer, *prepared([row], tokenizer, learn="answers")) == "3</s>"
    assert learnt(tokenizer, *prepared([row], tokenizer, template=JINJA)).startswith("<user>더해\n1,2</s>")


@pytest.mark.parametrize("text", ["a", "<s>a", "a</s>", "<s>a</s>"])
def test_bos_and_eos_are_there_once_whoever_writes_them(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    both = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    both.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    try:
        assert both("a")["input_ids"] == [1, *tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids, 2]
        (row,) = prepared([{"text": text}], both)
        assert row["input_ids"] == both("a")["input_ids"]
        (row,) = prepared([{"prompt": text.removesuffix("</s>"), "completion": "b"}], both)
        assert (row["input_ids"].count(1), row["input_ids"].count(2)) == (1, 1) or text.startswith("<s>")
        assert learnt(both, row) == "b</s>"
    finally:
        both.backend_tokenizer.post_processor = None  # it is the fixture's too


def test_rows_count_by_their_weight(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "completion": "bc", "weight": weight} for weight in (1.0, 0.5, 0.0, None)]
    made = prepared(rows, tokenizer)
    assert [row["row"] for row in made] == [[0], [1], [3]], "a row of weight 0 teaches nothing"
    once = [1.0] * 4
    assert [row["weights"] for row in made] == [once, [0.0, 0.5, 0.5, 0.5], once], (
        "of what is not learnt it says nothing"
    )


def test_answers_count_by_their_weight_and_say_what_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [TALK[0] | {"loss_weight": 0.0}, TALK[1] | {"loss_weight": 0.25}, TALK[2], TALK[3] | {"loss_weight": 2.0}]
    for learn in ("all", "answers"):
        (row,) = prepared([{"messages": talk, "weight": 2}], tokenizer, template=JINJA, learn=learn)
        assert learnt(tokenizer, row) == "1</s>|이</s>"
        weighed = [weight for weight, label in zip(row["weights"], row["labels"]) if label != IGNORED]
        assert weighed == [0.5] * 2 + [4.0] * 4
    talk[3] |= {"loss_weight": 0.0}
    (row,) = prepared([{"messages": talk}], tokenizer, template=JINJA)
    assert learnt(tokenizer, row) == "1</s>"


def test_weights_of_nought_and_one_need_no_column(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [TALK[0] | {"weight": 0}, TALK[1] | {"weight": 0}, TALK[2] | {"weight": 0}, TALK[3] | {"weight": 1}]
    (row,) = prepared([{"messages": talk}], tokenizer, template=JINJA)
    assert learnt(tokenizer, row) == "이</s>"
    assert set(row) == {"input_ids", "labels", "row", "lengths"}


def test_bad_rows_are_an_error_or_left_out_and_told(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"conversations": TALK}, {"conversations": []}, {"conversations": TALK}]
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): the conversation is empty.*data.bad_rows: skip"):
        prepared(rows, tokenizer, template=JINJA)
    assert [r["row"] for r in prepared(rows, tokenizer, template=JINJA, skip_bad_rows=True)] == [[0], [2]]
    assert "1 of 3 rows cannot be read and were left out. row 1 (counted from 0): the conversation is" in caplog.text


def test_several_processes_make_the_same_rows(real_tokenizer: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = real_tokenizer("smollm2")
    rows = [{"messages": [TALK[0], {"role": "assistant", "content": f"{n} <|im_end|>"}]} for n in range(4000)]
    alone = prepared(rows, tokenizer, learn="answers", skip_bad_rows=True)
    shared = prepared(rows, tokenizer, learn="answers", workers=2)
    assert alone == shared
    assert [row["row"] for row in shared] == [[n] for n in range(4000)]


TEXTS = [
    "<user>one</s>\n<assistant>1</s>\n<user>two</s>\n<assistant>이</s>\n",
    "<user>what is <b>?</s>\n<assistant></s>\n",
]


def test_ready_texts_are_cut_at_the_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    how = {"learn": "answers", "parts": ResponseParts("<user>", "<assistant>"), "text_field": "text"}
    made = prepared([{"text": text} for text in TEXTS], tokenizer, **how)
    assert [learnt(tokenizer, row) for row in made] == ["1</s>|이</s>", "</s>"]
    made = prepared([{"text": TEXTS[0]}], tokenizer, **(how | {"learn": "last_answer"}))
    assert learnt(tokenizer, made[0]) == "이</s>"


def test_ready_texts_need_no_parts_where_their_turns_stand_beside_them(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"text": TEXTS[0], "messages": TALK}
    how = {"template": JINJA, "learn": "answers", "text_field": "text"}
    assert learnt(tokenizer, *prepared([row], tokenizer, **how)) == "1</s>|이</s>"
    changed = row | {"text": TEXTS[0].replace("<user>", "<question>")}
    with pytest.raises(ConfigError, match="ready texts do not say where their answers are"):
        prepared([changed], tokenizer, **how)
    with pytest.raises(ConfigError, match="ready texts do not say where their answers are"):
        prepared([row | {"messages": []}], tokenizer, **how, skip_bad_rows=True)
    parts = ResponseParts("<question>", "<assistant>")
    assert learnt(tokenizer, *prepared([changed], tokenizer, **how, parts=parts)) == "1</s>|이</s>"


def test_parts_are_checked_against_what_was_found(tokenizer: PreTrainedTokenizerFast) -> None:
    how = {"template": JINJA, "learn": "answers"}
    right = prepared([{"messages": TALK}], tokenizer, **how, parts=ResponseParts("<user>", "<assistant>"))
    assert learnt(tokenizer, *right) == "1</s>|이</s>"
    with pytest.raises(DataError, match=r"response_part '<bot>' does not stand before the answer in turn 1; the"):
        prepared([{"messages": TALK}], tokenizer, **how, parts=ResponseParts("<user>", "<bot>"))
