"""What a trainer's arguments and rows say of passes: what `engine` runs by, and what `planning` predicts from."""

import math
import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from pyarrow.compute import list_value_length
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from jebi.config import launched
from jebi.config.launched import ALONE, World
from jebi.data.passes import collate, cut
from jebi.models.hf import JebiForCausalLM
from jebi.plan.rows import Lengths
from jebi.training.arguments import own_fields

_STEPS, _LOOKED_AT = 16, 30_000
"""Steps, and tokens at most, in which beginnings in common are looked for."""
_ANY = 2**40
"""Tokens of a pass that holds any step."""


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
    steps: int = 1
    """Optimizer steps."""
    world: World = ALONE
    """The training's processes."""
    rows: Lengths | None = None
    """The rows' lengths; None of a stream, where every row is taken for a longest one."""


def settings_of(
    model: JebiForCausalLM, args: TrainingArguments, limit: int, graphs: bool, rows: Any = None
) -> Settings:
    """The trainer's arguments as they concern passes.

    Args:
        model: what is trained.
        args: the trainer's.
        limit: tokens that no row exceeds.
        graphs: whether passes may be captured.
        rows: the token rows to train on.
    """
    recompute = args.gradient_checkpointing_kwargs or {}
    assert not isinstance(recompute, str), "TrainingArguments turns text into a dictionary"
    own = own_fields(args)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    # Tokens held once would share one dropout mask.
    lengths = lengths_of(rows, batch, not drops_out(model) and model.shares_beginnings(limit))
    steps = args.max_steps
    if steps <= 0:
        steps = 1 if lengths is None else math.ceil(args.num_train_epochs * lengths.rows / (batch * args.world_size))
    return Settings(
        limit if lengths is None else min(limit, lengths.longest),
        own.pass_tokens,
        bool(args.gradient_checkpointing),
        bool(recompute.get("offload")),
        args.label_smoothing_factor,
        graphs,
        OptimizerNames(args.optim).value,
        own.memory_budget,
        batch,
        steps,
        World(args.world_size, launched.here(args.world_size), model.model.sharded),
        lengths,
    )


def lengths_of(rows: Any, batch: int, shares: bool) -> Lengths | None:
    """The lengths of token rows, as they lie in their table; None of a stream.

    Args:
        rows: the token rows.
        batch: rows of a step.
        shares: whether beginnings in common are held once; how much that is, some steps' rows say.
    """
    if not isinstance(rows, Dataset) or not len(rows):
        return None
    tokens = list_value_length(rows.data.column("input_ids")).to_numpy()
    common = _common(rows, min(batch, len(rows)), float(tokens.mean())) if shares else 0.0
    return Lengths(len(rows), float(tokens.mean()), float(tokens.std()), int(tokens.max()), common)


def _common(rows: Dataset, batch: int, mean: float) -> float:
    """Tokens of a row's beginning that its step holds already."""
    if batch < 2:
        return 0.0
    steps = max(1, min(_STEPS, int(_LOOKED_AT / (mean * batch))))
    drawn, shared = random.Random(0), 0
    for _ in range(steps):
        picked = rows[drawn.sample(range(len(rows)), batch)]
        batches = [collate([dict(zip(picked, values)) for values in zip(*picked.values())])]
        shared += sum(part.tokens - part.input_ids.shape[1] for part in cut(batches, _ANY))
    return shared / (steps * (batch - 1))


def drops_out(model: JebiForCausalLM) -> bool:
    """Whether an adapter drops some of its inputs."""
    return any(m.adapter is not None and m.adapter.dropout > 0 for _, m in model.linears())
