"""Checkpoint folders that are whole or absent, in an output folder that is known to be writable."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from jebi.adapters.peft_files import read_weights
from jebi.errors import ConfigError
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import read_masters


def require_writable(folder: Path) -> None:
    """Make the output folder and try it, so that a long training does not end in an error.

    Raises:
        ConfigError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-test"):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir '{folder}' cannot be written to: {error.strerror}. Name another.") from error


def last_checkpoint(folder: Path) -> Path | None:
    """The folder of the last checkpoint, where there is one."""
    last = get_last_checkpoint(str(folder))
    return Path(last) if last else None


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it, so that it is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def note_best(final: Path, state: TrainerState) -> bool:
    """Where ``state`` names the best checkpoint in the staging folder, name its place under ``final``; tell whether."""
    if not state.best_global_step:
        return False
    best = final / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if state.best_global_step != state.global_step and not best.is_dir():
        return False
    state.best_model_checkpoint = str(best)
    return True


@contextmanager
def staged(final: Path, state: TrainerState, args: TrainingArguments, everyone: Callable[[], None]) -> Iterator[Path]:
    """A folder for Trainer to write a checkpoint in, which is moved into its place under ``final`` when it is whole.

    ``everyone`` waits for the other processes; one of them writes.
    """
    staging = final / ".partial"
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    yield staging
    everyone()
    note_best(final, state)
    if args.should_save:
        complete_checkpoint(staging, final, state, args)
    everyone()  # the best one may be read next


def complete_checkpoint(staging: Path, final: Path, state: TrainerState, args: TrainingArguments) -> Path:
    """Move the checkpoint that Trainer wrote under ``staging`` to its place under ``final``, then rotate old ones."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    target = final / name
    if note_best(final, state):
        # Trainer noted the staging folder's path, which is gone in a moment.
        state.save_to_json(str(staging / name / "trainer_state.json"))
    if target.exists():
        shutil.rmtree(target)
    (staging / name).replace(target)
    staging.rmdir()
    rotate_checkpoints(
        output_dir=str(final),
        save_total_limit=args.save_total_limit,
        best_model_checkpoint=state.best_model_checkpoint,
        use_mtime=True,
    )
    return target


def read_checkpoint(model: JebiForCausalLM, checkpoint: Path) -> None:
    """Copy what a checkpoint holds of the model, its adapter or all its weights, into the model."""
    if model.adapter is None:
        read_masters(model, checkpoint)
    else:
        read_weights(model, checkpoint)
