"""``SFTTrainer``'s data: every form that rows may come in is trained as what it means."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from jebi.errors import DataError

Fixture = Callable[..., Any]

ROUNDING = 1e-5
"""As in ``test_trainer``: the same numbers summed in another order, through a few steps of Adam."""


def ids_of(trainer: Any) -> list[list[int]]:
    return list(trainer.train_dataset["input_ids"])


@pytest.mark.parametrize("batched", [False, True])
def test_a_formatting_function_makes_the_texts(
    batched: bool, make_trainer: Fixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = Dataset.from_dict({"question": ["one", "two"], "answer": ["1", "2"]})

    def one(example: dict[str, Any]) -> str:
        return f"{example['question']}={example['answer']}</s>"

    def many(examples: dict[str, Any]) -> list[str]:
        return [f"{q}={a}</s>" for q, a in zip(examples["question"], examples["answer"])]

    function = many if batched else one
    trainer = make_trainer(train_dataset=asked, max_steps=1, trainer={"formatting_func": function})
    trainer.train()
    assert ids_of(trainer) == [tokenizer("one=1</s>")["input_ids"], tokenizer("two=2</s>")["input_ids"]]


def test_a_tokenizer_may_come_under_either_name_and_the_newer_wins(
    make_trainer: Fixture, tokenizer: PreTrainedTokenizerFast, byte_tokenizer: Fixture
) -> None:
    adding = byte_tokenizer(True)
    named = make_trainer(trainer={"tokenizer": None, "processing_class": adding})
    both = make_trainer(trainer={"tokenizer": tokenizer, "processing_class": adding})
    assert ids_of(named) == ids_of(both) == [[1, *ids] for ids in ids_of(make_trainer())]
    assert named.processing_class is adding


def test_bos_is_not_doubled(make_trainer: Fixture, byte_tokenizer: Fixture) -> None:
    adding = byte_tokenizer(True)
    texts = Dataset.from_dict({"text": ["<s>abc</s>", "abc</s>"]})
    first, second = ids_of(make_trainer(train_dataset=texts, trainer={"tokenizer": adding}))
    assert first == second
    assert first.count(1) == 1


def test_ready_token_ids_train_as_their_texts_do(
    make_trainer: Fixture,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    snapshot: Fixture,
    losses: Fixture,
    assert_equal: Fixture,
) -> None:
    texts = make_trainer(max_steps=2)
    ready = make_trainer(
        max_steps=2, train_dataset=rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    )
    texts.train()
    ready.train()
    assert losses(ready) == losses(texts)
    assert_equal(snapshot(ready.model), snapshot(texts.model))


def test_only_labelled_tokens_are_learnt(make_trainer: Fixture, make_model: Fixture, losses: Fixture) -> None:
    ids = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16]]
    labels = [[-100, -100, 7, 8, 9], [-100, 11, -100, 13, -100, -100, -100]]
    trainer = make_trainer(
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}), max_steps=1, allow=["missing-eos"]
    )
    trainer.train()
    total = 0.0
    for row, learnt in zip(ids, labels):
        with torch.no_grad():
            logits = make_model()(input_ids=torch.tensor([row])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(learnt[1:]), reduction="sum").item()
    assert losses(trainer) == pytest.approx([total / 5], rel=1e-6)  # float32 logits, summed in float32


def stream(rows: Dataset, repeats: int = 1) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        for _ in range(repeats):
            yield from rows

    return IterableDataset.from_generator(generate)


def test_a_stream_trains_as_the_same_rows_in_order_do(
    make_trainer: Fixture, rows: Dataset, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    known = make_trainer(train_sampling_strategy="sequential", **settings)
    streamed = make_trainer(train_dataset=stream(rows), **settings)
    known.train()
    streamed.train()
    assert losses(streamed) == losses(known)
    assert_equal(snapshot(streamed.model), snapshot(known.model))


def test_a_token_that_the_model_does_not_have_ends_a_stream_at_its_row(make_trainer: Fixture, monkeypatch) -> None:
    """Behind the rows that the check looks at."""
    monkeypatch.setattr("jebi.data.check.STREAMED", 8)
    ids = [[5, 6, 7 + row, 8] if row != 19 else [5, 6, 5_000, 8] for row in range(32)]
    rows = Dataset.from_dict({"input_ids": ids})
    with pytest.raises(DataError, match=r"^row 19 has the token 5000"):
        make_trainer(train_dataset=rows, allow=["missing-eos"]).train()
    trainer = make_trainer(train_dataset=stream(rows), max_steps=4, allow=["missing-eos"])
    with pytest.raises(DataError, match=r"^row 19 has the token 5000"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_stream_that_ends_within_a_step_goes_on_from_its_beginning_without_losing_or_overweighting_rows(
    make_trainer: Fixture, rows: Dataset, make_model: Fixture, losses: Fixture
) -> None:
    """Five rows, four to a step: the fifth joins the four that follow it, and the step's mean is over all five."""
    five = rows.select(range(5))
    short = make_trainer(
        train_dataset=stream(five),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
    )
    short.train()
    means = [
        make_trainer(train_dataset=five.select(part), max_steps=1, learning_rate=0.0) for part in (range(4), range(5))
    ]
    for trainer in means:
        trainer.train()
    assert losses(short) == pytest.approx([losses(trainer)[0] for trainer in means], rel=1e-6)  # float32 sums


def test_a_stream_needs_to_be_told_its_steps(make_trainer: Fixture, rows: Dataset) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(train_dataset=stream(rows))


def test_packed_rows_answer_as_the_rows_alone(make_trainer: Fixture, make_model: Fixture) -> None:
    trainer = make_trainer(packing=True)
    model = make_model().eval()
    packed = max(trainer.train_dataset, key=lambda sequence: len(sequence["lengths"]))
    assert len(packed["lengths"]) > 2
    positions = torch.cat([torch.arange(length) for length in packed["lengths"]])
    with torch.no_grad():
        together = model(input_ids=torch.tensor([packed["input_ids"]]), position_ids=positions[None]).logits[0]
        at = 0
        for length in packed["lengths"]:
            alone = model(input_ids=torch.tensor([packed["input_ids"][at : at + length]])).logits[0]
            # Logits of about 1 in float32; products of other shapes sum in another order.
            torch.testing.assert_close(together[at : at + length], alone, rtol=1e-5, atol=1e-5)
            at += length


def test_packing_trains_as_the_same_rows_unpacked(
    make_trainer: Fixture, rows: Dataset, snapshot: Fixture, losses: Fixture, assert_close: Fixture
) -> None:
    """One packed sequence a step on the one side, its rows on the other."""
    settings = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    packed = make_trainer(packing=True, per_device_train_batch_size=1, **settings)
    packed.train()
    groups = list(packed.train_dataset["row"])
    expected = make_trainer(
        train_dataset=rows.select(groups[0]), per_device_train_batch_size=len(groups[0]), max_steps=1
    )
    expected.train()
    first = make_trainer(packing=True, per_device_train_batch_size=1, max_steps=1, train_sampling_strategy="sequential")
    first.train()
    assert losses(first) == pytest.approx(losses(expected), rel=1e-6)  # the same rows in the same passes
    assert_close(snapshot(first.model), snapshot(expected.model), ROUNDING)
    assert packed.state.global_step == len(groups) < 21


def test_packing_everything_into_one_step_is_the_whole_epoch_at_once(
    make_trainer: Fixture, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    packed = make_trainer(packing=True, per_device_train_batch_size=21, max_steps=2)
    plain = make_trainer(per_device_train_batch_size=21, max_steps=2)
    packed.train()
    plain.train()
    assert losses(packed) == losses(plain)
    assert_equal(snapshot(packed.model), snapshot(plain.model))


def test_a_packed_stream_trains_as_the_same_packed_rows_do(
    make_trainer: Fixture, rows: Dataset, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    settings = {"packing": True, "max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    known = make_trainer(train_sampling_strategy="sequential", **settings)
    streamed = make_trainer(train_dataset=stream(rows), **settings)
    known.train()
    streamed.train()
    assert losses(streamed) == losses(known)
    assert_equal(snapshot(streamed.model), snapshot(known.model))


def test_long_rows_are_split_or_refused(make_trainer: Fixture, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Dataset.from_dict({"text": ["abcdefghij" * 2 + "</s>", "ab</s>"]})
    split = make_trainer(train_dataset=texts, max_seq_length=8, long="split", overlap=2, max_steps=1)
    assert [len(ids) for ids in ids_of(split)] == [8, 8, 8, 3, 3]
    assert split.train_dataset["labels"][1][:2] == [-100, -100]
    split.train()
    with pytest.raises(DataError, match="row 0 has 21 tokens, and long rows are refused"):
        make_trainer(train_dataset=texts, max_seq_length=8, long="refuse")


def test_rows_without_the_column_are_refused(make_trainer: Fixture) -> None:
    with pytest.raises(DataError, match="dataset_text_field 'text' is no column"):
        make_trainer(train_dataset=Dataset.from_dict({"content": ["a"]}))


def test_several_processes_make_the_same_rows(make_trainer: Fixture) -> None:
    many = Dataset.from_dict({"text": [f"row {number}</s>" for number in range(4000)]})
    alone = make_trainer(train_dataset=many)
    shared = make_trainer(train_dataset=many, dataset_num_proc=2)
    assert ids_of(shared) == ids_of(alone)
    assert [row for rows in shared.train_dataset["row"] for row in rows] == list(range(4000))
