"""What a trainer's arguments and rows say of passes: what `engine` runs by, and what `planning` predicts from."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from pyarrow.compute import list_value_length
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from jebi.plan.rows import Lengths
from jebi.training.arguments import SFTConfig


@dataclass(frozen=True)
class Settings:
    """What the trainer's arguments say of passes."""

    longest: int
    """Tokens of the longest row."""
    pass_tokens: int | None
    """Most tokens of a pass, where the user says so."""
    recompute: bool
    """Whether activations are to be recomputed, whatever the model says."""
    offload: bool
    """And from layer inputs in host memory."""
    label_smoothing: float
    """Share of the target spread over the vocabulary."""
    graphs: bool
    """Whether passes may be captured."""
    optimizer: str = "adamw_8bit"
    """`TrainingArguments.optim`."""
    budget: float | str | None = None
    """Memory that the training may take, as `plan.budget` reads it; None for all that is free."""
    batch: int = 8
    """Rows of a step, of one process."""
    rows: Lengths | None = None
    """The rows' lengths; None of a stream, where every row is taken for a longest one."""


def settings_of(args: TrainingArguments, limit: int, graphs: bool, rows: Any = None) -> Settings:
    """The trainer's arguments as they concern passes.

    Args:
        args: the trainer's.
        limit: tokens that no row exceeds.
        graphs: whether passes may be captured.
        rows: the token rows to train on.
    """
    recompute = args.gradient_checkpointing_kwargs or {}
    assert not isinstance(recompute, str), "TrainingArguments turns text into a dictionary"
    tokens, budget = (args.pass_tokens, args.memory_budget) if isinstance(args, SFTConfig) else (None, None)
    lengths = lengths_of(rows)
    return Settings(
        limit if lengths is None else min(limit, lengths.longest),
        tokens,
        bool(args.gradient_checkpointing),
        bool(recompute.get("offload")),
        args.label_smoothing_factor,
        graphs,
        OptimizerNames(args.optim).value,
        budget,
        args.per_device_train_batch_size * args.gradient_accumulation_steps,
        lengths,
    )


def lengths_of(rows: Any) -> Lengths | None:
    """The lengths of token rows, as they lie in their table; None of a stream."""
    if not isinstance(rows, Dataset) or not len(rows):
        return None
    tokens = list_value_length(rows.data.column("input_ids")).to_numpy()
    return Lengths(len(rows), float(tokens.mean()), float(tokens.std()), int(tokens.max()))
