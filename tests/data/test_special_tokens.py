"""``data.special_tokens``: what a row's own text spells never becomes a control token unless that is asked for."""

import pickle
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from jebi.data.chat_template import ChatTemplate
from jebi.data.conversation import Conversation, Turn
from jebi.data.encoding import Encoder, Written
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize
from jebi.errors import DataError

Real = Callable[[str], PreTrainedTokenizerBase]

NAMES = {
    "smollm2": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "llama3_1": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|reserved_special_token_7|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</think>", "<tool_response>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>"],
}


@cache
def encoder_of(tokenizer: PreTrainedTokenizerBase, policy: Any) -> Encoder:
    """One for each tokenizer: a copy without special tokens takes seconds where there are many."""
    return Encoder(tokenizer, ChatTemplate(tokenizer).literals, policy)


def encoded(tokenizer: PreTrainedTokenizerBase, row: Conversation, policy: Any = "text") -> list[int]:
    template = ChatTemplate(tokenizer)
    encoder = encoder_of(tokenizer, policy)
    hidden = encoder.special.hide(row)
    (tokens,) = encoder.encode([Written(template.render(hidden).text, hidden is not row, template.whole)])
    return tokens.ids


def conversation(question: str, answer: str = "fine") -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer)))


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_question_stay_text(name: str, real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer(name)
    plain = encoded(tokenizer, conversation("What is X?"))
    for special in NAMES[name]:
        ids = encoded(tokenizer, conversation(f"What is {special}? 뭐야{special}{special}"))
        number = tokenizer.convert_tokens_to_ids(special)
        assert ids.count(number) == plain.count(number), f"{special}: only the template's own"
        assert f"What is {special}? 뭐야{special}{special}" in tokenizer.decode(ids)
        assert ids.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_is_tokenised_as_ever(name: str, real_tokenizer: Real) -> None:
    """Of tokens that are special the text's own tokens are those of a tokenizer told to split them."""
    tokenizer = real_tokenizer(name)
    special = NAMES[name][0]
    question = f"줄 1\n\n  a {special} b\t{special}.\n끝"
    ids = encoded(tokenizer, conversation(question))
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": "@@@@"}, {"role": "assistant", "content": "fine"}], tokenize=False
    )
    before, after = opened.split("@@@@")
    last = before[before.rindex(">") + 1 :]  # the line break or two behind the header join the question's first token
    expected = tokenizer(before[: len(before) - len(last)], add_special_tokens=False)["input_ids"]
    expected += tokenizer(last + question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    expected += tokenizer(after, add_special_tokens=False)["input_ids"]
    assert ids == expected


@pytest.mark.parametrize("name", NAMES)
def test_hiding_changes_no_other_token(name: str, real_tokenizer: Real) -> None:
    """The copy of the tokenizer that special tokens are hidden from gives the tokenizer's own ids for other texts."""
    tokenizer = real_tokenizer(name)
    template = ChatTemplate(tokenizer)
    encoder = encoder_of(tokenizer, "text")
    chance = random.Random(7)
    letters = ["안", "녕", "a", "B", " ", "  ", "\n", "\n\n", "<b>", "1", "é", "👩‍🌾", "中", "<", "|", ">", "\t", "_"]
    for _ in range(60):
        text = "".join(chance.choices(letters, k=chance.randint(1, 40)))
        ids, offsets = encoder.special.encode(template.render(conversation(text)).text)
        assert ids == tokenizer.apply_chat_template(
            [turn.message() for turn in conversation(text).turns], return_dict=False
        )
        assert len(offsets) == len(ids)


def test_tokens_are_tokens_where_that_is_asked(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("smollm2")
    row = conversation("a<|im_end|>b")
    asked = tokenizer.apply_chat_template([turn.message() for turn in row.turns], return_dict=False)
    assert encoded(tokenizer, row, "tokens") == asked
    assert asked.count(tokenizer.eos_token_id) == encoded(tokenizer, row, "text").count(tokenizer.eos_token_id) + 1


def test_they_are_an_error_where_that_is_asked(real_tokenizer: Real) -> None:
    rows = Dataset.from_dict({"instruction": ["a", "b <|im_end|>"], "input": ["", ""], "output": ["c", "d"]})
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): the text holds the special token '<\|im_end\|>'"):
        tokenize(rows, real_tokenizer("smollm2"), Preparation(100, text_field=None, special_tokens="error"))


def test_reasoning_marks_in_an_answer_are_the_models_to_write(real_tokenizer: Real) -> None:
    """<think> is an added token of Qwen 3's and not special: in answers it is what the template makes of it."""
    tokenizer = real_tokenizer("qwen3")
    row = conversation("a", "<think>\nwhy\n</think>\n\nb")
    assert encoded(tokenizer, row) == tokenizer.apply_chat_template(
        [turn.message() for turn in row.turns], return_dict=False
    )
    assert tokenizer.convert_tokens_to_ids("<think>") in encoded(tokenizer, row)


def test_answers_are_still_found_behind_hidden_tokens(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("llama3_1")
    rows = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": "<|eot_id|>?"},
                    {"role": "assistant", "content": "<|eot_id|> ends."},
                ]
            }
        ]
    )
    (row,) = tokenize(rows, tokenizer, Preparation(100, learn="answers"))
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "<|eot_id|> ends.<|eot_id|>"
    assert row["labels"].count(tokenizer.eos_token_id) == 1


def test_ready_texts_are_the_users_own_tokens_and_all_text_where_asked(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("llama3_1")
    rows = Dataset.from_dict({"text": ["<|begin_of_text|>Hi<|eot_id|>"]})
    (row,) = tokenize(rows, tokenizer, Preparation(100))
    assert (row["input_ids"][0], row["input_ids"][-1], len(row["input_ids"])) == (128000, 128009, 3)
    (row,) = tokenize(rows, tokenizer, Preparation(100, special_tokens="text"))
    assert row["input_ids"].count(128000) == 1, "the tokenizer's own"
    assert 128009 not in row["input_ids"]
    assert tokenizer.decode(row["input_ids"][1:]) == rows[0]["text"]


def test_calls_tools_and_names_are_the_rows_text_too(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "f", "arguments": {"<|im_end|>": ["<|im_start|>"]}}}
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|></tool_call>"}}
    row = Conversation(
        (Turn("user", "a"), Turn("assistant", "", tool_calls=(call,)), Turn("tool", "</tool_response><|im_end|>")),
        (tool,),
    )
    ids = encoded(tokenizer, row)
    for name, count in (("<|im_end|>", 4), ("<|im_start|>", 4), ("</tool_response>", 1)):
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == count, name


def test_a_prompt_hides_them_as_training_does(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("llama3_1")
    template = ChatTemplate(tokenizer)
    row = conversation("what is <|eot_id|>?")
    (prompt,) = encoder_of(tokenizer, "text").prompts(template, [row.prompt])
    assert encoded(tokenizer, row)[: len(prompt)] == prompt


def test_an_encoder_goes_to_another_process(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("smollm2")
    template = ChatTemplate(tokenizer)
    encoder = Encoder(tokenizer, template.literals)
    row = conversation("<|im_end|>")
    written = [Written(template.render(encoder.special.hide(row)).text, True, True)]
    there = pickle.loads(pickle.dumps(encoder))
    assert there.encode(written) == encoder.encode(written)
    assert pickle.loads(pickle.dumps(encoder)).encode(written) == there.encode(written)


def test_characters_of_the_last_private_plane_are_text_like_any_other(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("smollm2")
    row = conversation("\U00100000 \U0010fffd")
    assert encoded(tokenizer, row) == encoded(tokenizer, row, "tokens")
    with pytest.raises(DataError, match="characters of Unicode's last private plane; drop either"):
        encoded(tokenizer, conversation("\U00100000 <|im_end|>"))
