"""What TRL's and Unsloth's scripts say about answers: trained through the trainer, with losses counted by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from jebi import train_on_responses_only
from jebi.errors import ConfigError, DataError

Fixture = Callable[..., Any]

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = {"instruction_part": "<user>", "response_part": "<assistant>"}

TALKS = [
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "zwei"},
    ],
    [{"role": "user", "content": "three?"}, {"role": "assistant", "content": "drei, 셋"}],
]
ANSWERS = ["1</s>zwei</s>", "drei, 셋</s>"]


@pytest.fixture
def chat_tokenizer(byte_tokenizer: Fixture) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer(False)
    tokenizer.chat_template = JINJA
    return tokenizer


def messages() -> Dataset:
    return Dataset.from_dict({"messages": TALKS})


def answers(trainer: Any, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode([n for n in labels if n != -100]) for labels in trainer.train_dataset["labels"]]


def test_messages_are_trained_whole_or_by_answers(make_trainer: Fixture, chat_tokenizer: Any) -> None:
    trainer = {"tokenizer": chat_tokenizer}
    whole = make_trainer(train_dataset=messages(), trainer=trainer)
    alone = make_trainer(train_dataset=messages(), trainer=trainer, assistant_only_loss=True, max_steps=1)
    assert answers(whole, chat_tokenizer) == [chat_tokenizer.apply_chat_template(t, tokenize=False) for t in TALKS]
    assert answers(alone, chat_tokenizer) == ANSWERS
    alone.train()


def test_completions_are_trained_alone_unless_that_is_switched_off(make_trainer: Fixture, chat_tokenizer: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["2+2=", "1+1="], "completion": ["4", "2"]})
    for setting, expected in ((None, "4</s>"), (True, "4</s>"), (False, "2+2=4</s>")):
        trainer = make_trainer(train_dataset=rows, completion_only_loss=setting)
        assert answers(trainer, chat_tokenizer)[0] == expected


@pytest.mark.parametrize("parts", [{}, PARTS])
def test_unsloths_call_learns_answers_of_turns_and_of_texts_made_of_them(
    parts: dict[str, str], make_trainer: Fixture, chat_tokenizer: Any
) -> None:
    texts = [chat_tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    for rows in (messages(), messages().add_column("text", texts)):
        trainer = make_trainer(train_dataset=rows, trainer={"tokenizer": chat_tokenizer, "eval_dataset": rows})
        given = train_on_responses_only(trainer, **parts)
        assert given is trainer
        assert answers(trainer, chat_tokenizer) == ANSWERS
        assert trainer.eval_dataset["labels"] == trainer.train_dataset["labels"]


def test_unsloths_call_cuts_texts_at_the_parts(make_trainer: Fixture, chat_tokenizer: Any, losses: Fixture) -> None:
    texts = Dataset.from_dict({"text": [chat_tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]})
    cut = train_on_responses_only(make_trainer(train_dataset=texts, max_steps=2), **PARTS)
    turns = make_trainer(
        train_dataset=messages(), max_steps=2, assistant_only_loss=True, trainer={"tokenizer": chat_tokenizer}
    )
    assert answers(cut, chat_tokenizer) == ANSWERS
    cut.train()
    turns.train()
    assert losses(cut) == losses(turns)


def test_a_packed_trainer_is_packed_again(make_trainer: Fixture, chat_tokenizer: Any) -> None:
    trainer = make_trainer(train_dataset=messages(), packing=True, trainer={"tokenizer": chat_tokenizer})
    train_on_responses_only(trainer)
    assert answers(trainer, chat_tokenizer) == ["".join(ANSWERS)]


def test_wrong_parts_are_told(make_trainer: Fixture, chat_tokenizer: Any) -> None:
    trainer = make_trainer(train_dataset=messages(), trainer={"tokenizer": chat_tokenizer})
    with pytest.raises(DataError, match="response_part '<bot>' does not stand before the answer"):
        train_on_responses_only(trainer, "<user>", "<bot>")
    with pytest.raises(ConfigError, match="both, or neither"):
        train_on_responses_only(trainer, response_part="<bot>")


def test_texts_without_parts_and_ready_tokens_are_refused_with_a_way_out(make_trainer: Fixture, rows: Dataset) -> None:
    with pytest.raises(ConfigError, match="ready texts do not say where their answers are"):
        train_on_responses_only(make_trainer())
    with pytest.raises(ConfigError, match="ready texts do not say where their answers are"):
        make_trainer(assistant_only_loss=True)
    ready = make_trainer(train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]]}))
    with pytest.raises(ConfigError, match="given as token ids: their labels say what is learnt"):
        train_on_responses_only(ready, **PARTS)


def weighed_mean(model: Any, rows: Dataset) -> float:
    """Sum of weight times loss over the sum of weights, row by row through all the logits."""
    total, weights = 0.0, 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none")
        kept = torch.tensor(row["weights"][1:]) * (torch.tensor(row["labels"][1:]) != -100)
        total += float((each * kept).sum())
        weights += float(kept.sum())
    return total / weights


def weighed_rows(scale: float = 1.0) -> Dataset:
    talks = [
        [talk[0], talk[1] | {"weight": weight}, *talk[2:]] for talk, weight in zip(TALKS * 2, (0.5, 2.0, 0.0, 1.0))
    ]
    return Dataset.from_list([{"messages": talk, "weight": scale * (1.0 + n)} for n, talk in enumerate(talks)])


@pytest.mark.parametrize(("batch", "accumulation", "pass_tokens"), [(4, 1, None), (2, 2, 30), (1, 4, 1)])
def test_a_weighed_loss_is_the_weighed_mean_however_it_runs(
    batch: int,
    accumulation: int,
    pass_tokens: int | None,
    make_trainer: Fixture,
    make_model: Fixture,
    chat_tokenizer: Any,
    losses: Fixture,
) -> None:
    trainer = make_trainer(
        train_dataset=weighed_rows(),
        trainer={"tokenizer": chat_tokenizer, "eval_dataset": weighed_rows()},
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        pass_tokens=pass_tokens,
        max_steps=1,
    )
    expected = weighed_mean(make_model(), trainer.train_dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)  # float32 logits, summed in float32
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=1e-6)


def test_a_row_of_weight_two_trains_as_the_row_twice(
    make_trainer: Fixture, chat_tokenizer: Any, snapshot: Fixture, assert_close: Fixture
) -> None:
    rows = [{"messages": TALKS[0]}, {"messages": TALKS[1]}, {"messages": TALKS[1]}]
    weighed = [{"messages": TALKS[0], "weight": 1.0}, {"messages": TALKS[1], "weight": 2.0}]
    trainers = [
        make_trainer(train_dataset=Dataset.from_list(given), trainer={"tokenizer": chat_tokenizer}, max_steps=2)
        for given in (rows, weighed)
    ]
    for trainer in trainers:
        trainer.train()
    # As in test_trainer: the same numbers summed in another order, through two steps of Adam.
    assert_close(snapshot(trainers[0].model), snapshot(trainers[1].model), 1e-5)


def test_a_mean_does_not_change_with_the_weights_scale(
    make_trainer: Fixture, chat_tokenizer: Any, losses: Fixture
) -> None:
    """However small the weights are: their sum, not the number of tokens, is what the loss is divided by."""
    found = []
    for scale in (1.0, 0.001):
        rows = weighed_rows(scale)
        trainer = make_trainer(
            train_dataset=rows, trainer={"tokenizer": chat_tokenizer, "eval_dataset": rows}, max_steps=1
        )
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        found.append([evaluated, *losses(trainer)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # float32 sums
