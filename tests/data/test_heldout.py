"""``data.heldout``: of a held-out row the answer and its EOS are measured and nothing else, whatever the cut."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from jebi.data.chat_template import ChatTemplate
from jebi.data.conversation import Conversation, Turn
from jebi.data.heldout import answer_rows, summed_loss
from jebi.data.passes import collate
from jebi.data.templates import TextTemplate
from jebi.models.unpadding import IGNORED

TEMPLATE = TextTemplate("t", "{instruction}|{input}|{output}", "</s>")


def row(instruction: str, input: str, output: str) -> Conversation:
    return Conversation((Turn("user", instruction, input), Turn("assistant", output)))


ROWS = [row("add", "1,2", "three"), row("hello", "", "안녕"), row("x", "", "")]


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_only_the_answer_and_its_eos_are_labelled(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(name)
    for number, (made, given) in enumerate(zip(answer_rows(ROWS, TEMPLATE, tokenizer, 100), ROWS, strict=True)):
        assert made["input_ids"] == tokenizer(TEMPLATE.render(given).text)["input_ids"]
        learnt = [label for label in made["labels"] if label != IGNORED]
        assert tokenizer.decode(learnt) == given.last_answer + "</s>"
        assert made["labels"] == [IGNORED] * (len(made["labels"]) - len(learnt)) + learnt, "the answer is the end"
        assert (made["row"], made["lengths"]) == ([number], [len(made["input_ids"])])


def test_bos_is_not_doubled_by_a_template_that_begins_with_it(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    template = TextTemplate("t", "<s>{instruction}|{output}", "</s>")
    (made,) = answer_rows([row("add", "", "three")], template, bos_tokenizer, 100)
    assert made["input_ids"] == bos_tokenizer("add|three</s>")["input_ids"]
    assert bos_tokenizer.decode([label for label in made["labels"] if label != IGNORED]) == "three</s>"


def test_a_chat_template_that_writes_no_bos_gets_none(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    (made,) = answer_rows([row("add", "", "three")], ChatTemplate(bos_tokenizer, jinja), bos_tokenizer, 100)
    assert bos_tokenizer.decode(made["input_ids"]) == "user:add</s>assistant:three</s>", "as in training"


def test_a_long_row_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    (made,) = answer_rows(ROWS[:1], TEMPLATE, tokenizer, 10)
    assert tokenizer.decode(made["input_ids"]) == "add|1,2|th"
    assert tokenizer.decode([label for label in made["labels"] if label != IGNORED]) == "th"


class Uniform:
    """Every token costs 2 nats; counts its calls."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls = 0

    def shares_beginnings(self, longest: int) -> bool:
        return True

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        assert inputs["num_items_in_batch"] == 1
        assert not torch.is_grad_enabled()
        return SimpleNamespace(loss=2.0 * inputs["learnt"].counts_N.sum())


@pytest.mark.parametrize("tokens", [1, 20, 10**6])
def test_the_sum_goes_over_learnt_tokens_however_it_is_cut(tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
    rows = answer_rows(ROWS, TEMPLATE, tokenizer, 100)
    model = Uniform()
    total, learnt = summed_loss(model, [collate(rows[:2]), collate(rows[2:])], tokens)
    assert learnt == len("three") + 1 + len("안녕".encode()) + 1 + 1
    assert total == 2.0 * learnt
    assert model.calls == (3 if tokens == 1 else model.calls)


def test_nothing_to_measure_is_zero_of_zero() -> None:
    assert summed_loss(Uniform(), [], 100) == (0.0, 0)
