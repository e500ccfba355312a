"""A training as a plan sees it: a model as it is held, the rows of a step, and what the user leaves no choice in.

Made of a run's settings before anything is loaded (`job_of`), or of a loaded model (`training.planning`). What comes of
a job is `prediction`'s. No torch here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jebi.config import Checkpointing, Places, RunConfig
from jebi.config.checking import typed
from jebi.config.launched import ALONE, World
from jebi.errors import ConfigError
from jebi.models.families import DecoderShape
from jebi.plan.budget import checkpointing_of
from jebi.plan.held import Held
from jebi.plan.rows import SUFFIXES, estimate
from jebi.plan.time import Load


@dataclass(frozen=True)
class Job:
    """A training, as settings and rows say it."""

    held: Held
    """The model and its adapter."""
    longest: int
    """Tokens of the longest row: ``max_seq_length``, or less where rows are known to be shorter."""
    batch: int
    """Rows of an optimizer step, of one process: batch size times accumulation."""
    steps: int
    """Optimizer steps."""
    asked: Checkpointing | None = None
    """What layers keep, where the user says so."""
    places: Places = Places()  # noqa: RUF009  (frozen)
    """Where embedding and head are to be, as far as that is said."""
    row: float | None = None
    """Mean tokens of a row; None where all are as long as may be."""
    spread: float = 0.0
    """Standard deviation of a row's tokens."""
    common: float = 0.0
    """Tokens of the beginning that a row shares with the others of its step, which is held once."""
    learnt: float = 1.0
    """Share of the tokens that are learnt."""
    checkpoints: int = 0
    """Checkpoints that lie on disk."""
    pass_tokens: int | None = None
    """Most tokens of a pass, where the user says so."""

    @property
    def step_tokens(self) -> float:
        """Mean tokens of a process's rows in a step."""
        return self.batch * (self.row or self.longest)

    @property
    def held_tokens(self) -> float:
        """Mean tokens of a step that are held: beginnings in common once."""
        return self.step_tokens - (self.batch - 1) * self.common

    def most_tokens(self, deviations: int) -> int:
        """Held tokens of a large step, so many standard deviations above the mean."""
        most = self.held_tokens + deviations * self.spread * math.sqrt(self.batch)
        return max(1, min(self.batch * self.longest, math.ceil(most)))

    @property
    def largest(self) -> int:
        """Tokens that a pass must hold: the longest row, or as many as the user wants in it."""
        return max(self.longest, min(self.pass_tokens or 0, self.batch * self.longest))

    def pass_limit(self, most: int) -> int:
        """Most tokens that a pass needs, where ``most`` are worth having: all rows of about any step."""
        if self.pass_tokens is not None:
            return min(self.pass_tokens, self.batch * self.longest)
        return min(most, max(self.longest, padded(self.most_tokens(4))))

    def filled(self, tokens: int) -> int:
        """Tokens that a run's largest pass has, where a plan allows so many: whole rows, no more than a step's.

        A row that is longer than a plan's passes is one by itself.
        """
        if self.row is None:
            return max(1, min(tokens // self.longest, self.batch)) * self.longest
        large = self.most_tokens(2)
        return max(self.longest, min(tokens, padded(large) if self.held.on_card else large))

    @property
    def sizes(self) -> int:
        """Different numbers of tokens that its passes have: those between short and long steps, at most one a step."""
        if self.row is None:
            return 1
        return min(self.steps, 1 + math.ceil(4 * self.spread * math.sqrt(self.batch)))

    def load(self, pass_tokens: int) -> Load:
        """A step's rows, in passes of so many tokens."""
        passes = math.ceil(self.held_tokens / max(1, pass_tokens))
        return Load(self.held_tokens, self.row or self.longest, self.learnt, passes, self.step_tokens)


def padded(tokens: int) -> int:
    """Passes of a card are padded to multiples of 256."""
    return -(-tokens // 256) * 256


def job_of(run: RunConfig, shape: DecoderShape, bfloat16: bool, rows: Path | None = None, world: World = ALONE) -> Job:
    """The job of a run's settings, as one of its processes has it.

    Args:
        run: the settings.
        shape: the model's.
        bfloat16: whether the device computes in 16 bits, where the run leaves that open.
        rows: a file by whose rows steps are as long as they are; without it every row is as long as it may be.
        world: the processes.

    Raises:
        ConfigError: a number of section ``train`` is none, or too small.
        DataError: ``rows`` cannot be read.
    """
    train, model = run.train, run.model
    batch = _whole(train, "per_device_train_batch_size", 8) * _whole(train, "gradient_accumulation_steps", 1)
    pass_tokens = None if train.get("pass_tokens") is None else _whole(train, "pass_tokens", 1)
    element = 4 if model.dtype == "float32" or (model.dtype is None and not bfloat16) else 2
    held = Held(
        shape, model.storage, element, lora=None if model.full_finetuning else run.lora,
        optimizer=str(train.get("optim", "adamw_torch")), fp8=model.compute != "auto", world=world,
        exact_forward=model.compute == "fp8_backward",
    )  # fmt: skip
    steps, asked = _whole(train, "max_steps", -1, least=-1), checkpointing_of(train)
    job = Job(held, model.max_seq_length, batch, steps, asked, model.places, pass_tokens=pass_tokens)
    if rows is None:
        return replace(job, steps=steps if steps > 0 else 60)
    lengths = estimate(rows, model.max_seq_length, shape.vocabulary)
    if steps <= 0:
        epochs = typed(float, train.get("num_train_epochs", 3.0), "train.num_train_epochs")
        steps = max(1, -(-int(lengths.rows * epochs) // (batch * world.ranks)))
    longest = min(model.max_seq_length, lengths.longest)
    # Tokens held once would share one dropout mask.
    common = 0.0 if run.lora.lora_dropout else lengths.common
    return replace(job, longest=longest, steps=steps, row=lengths.mean, spread=lengths.deviation, common=common)


def rows_of(run: RunConfig) -> Path | None:
    """The file that the run trains on, where it is one that can be looked at and whose rows are passes' rows."""
    if not isinstance(run.data.train, str) or run.data.packing:
        return None
    path = Path(run.data.train)
    return path if path.is_file() and path.suffix in SUFFIXES else None


def _whole(train: Mapping[str, Any], name: str, default: int, least: int = 1) -> int:
    """A whole number of section ``train``, which is checked in whole only where transformers is loaded."""
    found: int = typed(int, train.get(name, default), f"train.{name}")
    if found < least:
        raise ConfigError(f"train.{name} must be at least {least}, not {found}; {default} is the default.")
    return found
