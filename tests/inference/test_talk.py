"""A conversation remembers what its template can write and the model's length can hold, and tells its speed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.data.templates import CHAT, named
from jebi.errors import DataError
from jebi.inference.generation import prepare
from jebi.inference.talk import Talk
from jebi.models.hf import JebiForCausalLM

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(tiny_folder, load) -> JebiForCausalLM:
    made = load(tiny_folder)
    attach(made, LoraConfig(r=4))
    with torch.no_grad():
        for tensor in adapter_tensors(made).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    made.generation_config.pad_token_id = 0
    return prepare(made)


@pytest.fixture
def talk(model: JebiForCausalLM, byte_tokenizer: Callable[[bool], Any], prompts: list[str]) -> Callable[[str], Talk]:
    """``talk(template)``; every prompt is noted in ``prompts``."""

    def make(spec: str) -> Talk:
        tokenizer = byte_tokenizer(False)
        tokenizer.chat_template = JINJA
        made = Talk(model, tokenizer, named(spec, tokenizer), 4)
        ids_of = made._prompt

        def noted(asked):
            ids = ids_of(asked)
            prompts.append(tokenizer.decode(ids))
            return ids

        made._prompt = noted
        return made

    return make


@pytest.fixture
def prompts() -> list[str]:
    return []


def test_a_chat_template_is_given_what_was_said(talk, prompts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = talk(CHAT)
    first = made.ask("one", tuned=True)
    assert capsys.readouterr().out.strip() == first.text
    assert 0 < first.tokens <= 4
    assert first.first_s > 0
    assert first.tokens_per_s > 0
    made.ask("two", tuned=False, stream=False)
    assert not capsys.readouterr().out
    assert prompts[0] == "<user>one</s>\n<assistant>"
    assert prompts[1] == f"<user>one</s>\n<assistant>{first.text}</s>\n<user>two</s>\n<assistant>"
    made.forget()
    made.ask("three", tuned=True, stream=False)
    assert prompts[2] == "<user>three</s>\n<assistant>"


def test_the_oldest_is_forgotten_where_all_is_too_long(talk, model, prompts: list[str]) -> None:
    made = talk(CHAT)
    for question in ("one", "two", "three"):
        made.ask(question, tuned=True, stream=False)
    model.max_seq_length = len(prompts[2])
    made.ask("four", tuned=True, stream=False)
    assert "one" not in prompts[3]
    assert prompts[3].endswith("<user>four</s>\n<assistant>")


def test_a_template_for_one_question_is_given_one(talk, prompts: list[str]) -> None:
    made = talk("{instruction}: {output}")
    for question in ("one", "two"):
        made.ask(question, tuned=True, stream=False)
    assert prompts == ["one: ", "two: "]


def test_the_adapter_takes_part_or_not(talk) -> None:
    made = talk("{instruction}: {output}")
    tuned, base = made.ask("one", True, False), made.ask("one", False, False)
    assert tuned.text != base.text
    assert made.ask("one", True, False).text == tuned.text


def test_what_nobody_could_answer_is_said(talk, model, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="the template writes nothing for this question"):
        talk("{% for m in messages %}{{ m.contnt }}{% endfor %}").ask("one", tuned=True, stream=False)
    model.max_seq_length = 20
    talk(CHAT).ask("much longer than that", tuned=True, stream=False)
    assert "tokens, of which the model was made for 20" in caplog.text
