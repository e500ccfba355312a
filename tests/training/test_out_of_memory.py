"""``training.out_of_memory``: a training that runs out of memory says all that is known, and keeps what it learnt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jebi.errors import OutOfMemoryError
from jebi.plan.inventory import GIB
from jebi.plan.passes import PassPlan
from jebi.training.engine import Engine
from jebi.training.out_of_memory import Planned, _measured, _way_out, ran_out
from jebi.training.pass_settings import Settings

Fixture = Callable[..., Any]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception], None]:
    """``failing(step, error)``: the passes of that step end in it."""

    def fail(step: int, error: Exception) -> None:
        run, calls = Engine.run, iter(range(1, 100))

        def failing(self: Engine, *args: Any) -> Any:
            if next(calls) < step:
                return run(self, *args)
            self.passing = True
            raise error

        monkeypatch.setattr(Engine, "run", failing)

    return fail


def test_plan_state_and_way_out_are_told_and_the_steps_made_are_kept(
    failing: Fixture, make_trainer: Fixture, tmp_path: Path, snapshot: Fixture, assert_equal: Fixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The checkpoint is that of the last whole step: going on from it is the training that had memory enough."""
    straight = make_trainer(max_steps=4, output_dir=str(tmp_path / "straight"))
    straight.train()
    with monkeypatch.context():
        failing(3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
        trainer = make_trainer(max_steps=4)
        with pytest.raises(OutOfMemoryError) as caught:
            trainer.train()
    told = str(caught.value)
    assert told.startswith("memory ran out: planned were passes of ")
    for part in (
        "GB at the peak; ",
        "GB of this machine's memory are free. ",
        "Take a smaller model",
        "checkpoint-2' is kept",
    ):
        assert part in told
    monkeypatch.undo()
    again = make_trainer(max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.report.steps == 2
    assert_equal(snapshot(again.model), snapshot(straight.model))


def test_before_the_first_step_there_is_nothing_to_keep(failing: Fixture, make_trainer: Fixture) -> None:
    failing(1, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(OutOfMemoryError, match=r"No step was saved\.$"):
        make_trainer(max_steps=2).train()


def test_a_checkpoint_written_before_is_named(failing: Fixture, make_trainer: Fixture) -> None:
    failing(3, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    with pytest.raises(OutOfMemoryError, match="checkpoint-2' is kept"):
        make_trainer(max_steps=4, save_strategy="steps", save_steps=1).train()


def test_other_errors_stay_what_they_are(failing: Fixture, make_trainer: Fixture) -> None:
    failing(1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match=r"^something else$"):
        make_trainer(max_steps=2).train()


def test_a_capture_that_failed_for_want_of_memory_is_known_by_its_cause() -> None:
    failed = RuntimeError("operation failed due to a previous error during capture")
    failed.__context__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert ran_out(failed)
    assert not ran_out(RuntimeError("shape mismatch"))


def test_of_a_card_it_is_told_who_holds_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.85 GB is its context's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB // 4, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 19 * GIB)
    assert _measured(torch.device("cuda")) == (
        "measured were 20.00 GB reserved, 19.00 of them allocated, and of the card's 24.00 GB 0.25 free, "
        "2.90 held by others"
    )


def test_a_smaller_budget_is_advised_where_the_training_fits_one(
    make_model: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(128, None, False, False, 0.0, False)
    planned = Planned(make_model(), settings, PassPlan("none", 512), {"peak_gb": 8.0})
    assert _way_out(planned) == 'Train with memory_budget="7.2GB".'
