"""``training.prefetch``: the same rows in the same steps, read earlier; errors where they belong."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jebi.data.passes import Batch, collate
from jebi.training.engine import Engine
from jebi.training.prefetch import Prefetch

Fixture = Callable[..., Any]
BATCHES: list[Batch] = [{"number": number} for number in range(5)]


def numbers(batches: list[Batch]) -> list[int]:
    return [batch["number"] for batch in batches]


def test_every_batch_is_handed_out_once_in_its_order() -> None:
    prefetch = Prefetch(numbers)
    epoch = iter(BATCHES)
    taken = []
    for count in (2, 2, 1):
        taken.append(numbers(prefetch.take(epoch, count)))
        prefetch.ahead(2)
    assert taken == [[0, 1], [2, 3], [4]]
    assert prefetch.take(epoch, 2) == []
    # An epoch that is left early: what was read of it is forgotten.
    other = iter(BATCHES)
    prefetch.take(other, 2)
    prefetch.ahead(2)
    assert numbers(prefetch.take(iter(BATCHES), 3)) == [0, 1, 2]


def test_a_step_is_made_once_where_it_is_of_what_was_read() -> None:
    made = []

    def make(batches: list[Batch]) -> list[int]:
        made.append(numbers(batches))
        return numbers(batches)

    prefetch, epoch = Prefetch(make), iter(BATCHES)
    first = prefetch.take(epoch, 2)
    assert prefetch.parts(first) == [0, 1]
    prefetch.ahead(2)
    assert prefetch.parts(prefetch.take(epoch, 2)) == [2, 3]
    assert made == [[0, 1], [2, 3]]
    prefetch.ahead(1)
    # With rows from before, as where a stream ends within a step.
    assert prefetch.parts([*first, *prefetch.take(epoch, 1)]) == [0, 1, 4]
    assert made == [[0, 1], [2, 3], [4], [0, 1, 4]]


def test_an_error_waits_for_the_step_it_belongs_to() -> None:
    def failing() -> Iterator[Batch]:
        yield from BATCHES[:3]
        raise KeyError("row 3")

    prefetch, epoch = Prefetch(numbers), failing()
    assert numbers(prefetch.take(epoch, 2)) == [0, 1]
    prefetch.ahead(2)
    with pytest.raises(KeyError, match="row 3"):
        prefetch.take(epoch, 2)


RUN = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
"""Of 21 rows an epoch has steps of 6, 6, 6 and 3."""


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_reading_ahead_changes_no_bit(
    make_trainer: Fixture,
    make_model: Fixture,
    losses: Fixture,
    snapshot: Fixture,
    assert_equal: Fixture,
    monkeypatch: pytest.MonkeyPatch,
    dropout: float,
) -> None:
    ahead = make_trainer(make_model(lora_dropout=dropout), **RUN)
    ahead.train()
    monkeypatch.setattr(Prefetch, "ahead", lambda self, count: None)
    plain = make_trainer(make_model(lora_dropout=dropout), **RUN)
    plain.train()
    assert losses(ahead) == losses(plain)
    assert ahead.state.global_step == 8
    assert_equal(snapshot(ahead.model), snapshot(plain.model))


def test_steps_are_prepared_before_they_begin_and_rows_beyond_the_last_stay_unread(
    make_trainer: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=3, **RUN)
    collated = []
    trainer.data_collator = lambda examples: collated.append(len(examples)) or collate(examples)
    seen, cuts = [], []
    inner, cut = trainer.training_step, Engine.passes

    def training_step(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(cuts))
        return inner(*args, **kwargs)

    trainer.training_step = training_step
    monkeypatch.setattr(Engine, "passes", lambda engine, batches: cuts.append(len(batches)) or cut(engine, batches))
    trainer.train()
    assert cuts == [2, 2, 2]
    # The first step is cut as it runs, the others before their first micro-batch comes.
    assert seen == [0, 0, 2, 2, 3, 3]
    # Three steps of two, and the one that accelerate's loader itself reads ahead.
    assert len(collated) == 7


def test_rows_that_cannot_be_read_stop_at_their_own_step(make_trainer: Fixture, losses: Fixture) -> None:
    trainer = make_trainer(**RUN)
    count = 0

    def failing(examples: list[Any]) -> Batch:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyError("the sixth batch")
        return collate(examples)

    trainer.data_collator = failing
    with pytest.raises(KeyError, match="the sixth batch"):
        trainer.train()
    # The loader reads one ahead: asking for the fifth, which is of the third step, fails.
    assert len(losses(trainer)) == 2
