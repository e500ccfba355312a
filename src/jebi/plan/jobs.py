"""A training as a plan sees it: a model as it is held, the rows of a step, and what the user leaves no choice in.

Made of a run's settings before anything is loaded (`job_of`), or of a loaded model (`training.planning`). What comes of
a job is `prediction`'s. No torch here.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from jebi.config import Checkpointing, Places, RunConfig
from jebi.models.families import DecoderShape
from jebi.plan.budget import checkpointing_of
from jebi.plan.inventory import Held
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
    """Rows of an optimizer step: batch size times accumulation."""
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

    @property
    def step_tokens(self) -> float:
        """Mean tokens of a step's rows."""
        return self.batch * (self.row or self.longest)

    @property
    def held_tokens(self) -> float:
        """Mean tokens of a step that are held: beginnings in common once."""
        return self.step_tokens - (self.batch - 1) * self.common

    def most_tokens(self, deviations: int) -> int:
        """Held tokens of a large step, so many standard deviations above the mean."""
        most = self.held_tokens + deviations * self.spread * math.sqrt(self.batch)
        return max(1, min(self.batch * self.longest, math.ceil(most)))

    def pass_limit(self, most: int) -> int:
        """Most tokens that a pass needs, where ``most`` are worth having: all rows of about any step."""
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
        """Different numbers of tokens that its passes have."""
        return 1 if self.row is None else self.steps

    def load(self, pass_tokens: int) -> Load:
        """A step's rows, in passes of so many tokens."""
        passes = math.ceil(self.held_tokens / max(1, pass_tokens))
        return Load(self.held_tokens, self.row or self.longest, self.learnt, passes, self.step_tokens)


def padded(tokens: int) -> int:
    """Passes of a card are padded to multiples of 256."""
    return -(-tokens // 256) * 256


def job_of(run: RunConfig, shape: DecoderShape, bfloat16: bool, rows: Path | None = None) -> Job:
    """The job of a run's settings.

    Args:
        run: the settings.
        shape: the model's.
        bfloat16: whether the device computes in 16 bits, where the run leaves that open.
        rows: a file by whose rows steps are as long as they are; without it every row is as long as it may be.

    Raises:
        DataError: ``rows`` cannot be read.
    """
    train, model = run.train, run.model
    batch = int(train.get("per_device_train_batch_size", 8)) * int(train.get("gradient_accumulation_steps", 1))
    element = 4 if model.dtype == "float32" or (model.dtype is None and not bfloat16) else 2
    held = Held(
        shape, model.storage, element, lora=None if model.full_finetuning else run.lora,
        optimizer=str(train.get("optim", "adamw_torch")), fp8=model.compute == "fp8",
    )  # fmt: skip
    steps, asked = int(train.get("max_steps", -1)), checkpointing_of(train)
    if rows is None:
        return Job(held, model.max_seq_length, batch, steps if steps > 0 else 60, asked, model.places)
    lengths = estimate(rows, model.max_seq_length, shape.vocabulary)
    if steps <= 0:
        steps = -(-int(lengths.rows * float(train.get("num_train_epochs", 3))) // batch)
    longest = min(model.max_seq_length, lengths.longest)
    # Tokens held once would share one dropout mask.
    common = 0.0 if run.lora.lora_dropout else lengths.common
    return Job(held, longest, batch, steps, asked, model.places, lengths.mean, lengths.deviation, common)


def rows_of(run: RunConfig) -> Path | None:
    """The file that the run trains on, where it is one that can be looked at without reading it as rows."""
    if not isinstance(run.data.train, str):
        return None
    path = Path(run.data.train)
    return path if path.is_file() and path.suffix in SUFFIXES else None
