"""``training.checkpoints``: an output folder is tried beforehand, and a checkpoint is moved into place whole."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from jebi.errors import ConfigError
from jebi.training.checkpoints import complete_checkpoint, require_writable


def test_a_missing_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"output_dir '.*{name}' cannot be written to: .+\. Name another\."):
        require_writable(tmp_path / name)


def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)  # a test run as root may write everywhere
    with pytest.raises(ConfigError, match="cannot be written to: Permission denied"):
        require_writable(tmp_path)


def written(staging: Path, step: int, **facts: Any) -> TrainerState:
    """What Trainer leaves in the staging folder."""
    folder = staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(f"of step {step}")
    state = TrainerState(global_step=step, **facts)
    state.save_to_json(str(folder / "trainer_state.json"))
    return state


def limit(count: int | None) -> Any:
    return SimpleNamespace(save_total_limit=count)


def test_a_checkpoint_is_moved_whole_and_the_staging_folder_goes(tmp_path: Path) -> None:
    state = written(tmp_path / ".partial", 3)
    assert complete_checkpoint(tmp_path / ".partial", tmp_path, state, limit(None)) == tmp_path / "checkpoint-3"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "of step 3"


def test_an_older_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "stale").write_text("")
    complete_checkpoint(tmp_path / ".partial", tmp_path, written(tmp_path / ".partial", 3), limit(None))
    assert sorted(entry.name for entry in (tmp_path / "checkpoint-3").iterdir()) == ["trainer_state.json", "weights"]


def test_the_best_one_is_noted_where_it_will_lie(tmp_path: Path) -> None:
    staging = tmp_path / ".partial"
    state = written(staging, 2, best_global_step=2, best_model_checkpoint=str(staging / "checkpoint-2"))
    complete_checkpoint(staging, tmp_path, state, limit(None))
    noted = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert noted["best_model_checkpoint"] == state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_best_one_that_is_gone_is_not_claimed(tmp_path: Path) -> None:
    state = written(tmp_path / ".partial", 2, best_global_step=1)
    complete_checkpoint(tmp_path / ".partial", tmp_path, state, limit(None))
    assert state.best_model_checkpoint is None


def test_older_ones_go_but_never_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        best = min(step, 2)
        state = written(tmp_path / ".partial", step, best_global_step=best)
        complete_checkpoint(tmp_path / ".partial", tmp_path, state, limit(2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
