"""A training's processes and cards: what it needs over several of them beside Trainer's own handling."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainingArguments


def suit(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Settle what is left open: 4-bit weights are not sent anew every step; every adapter takes part in every pass."""
    if model.device.type == "cpu":
        args.dataloader_pin_memory = False  # torch warns where there is no card to pin for
    if args.n_gpu > 1:
        args._n_gpu = 1  # One process trains on one card; Trainer would copy the model to all of them each step.
    if args.ddp_broadcast_buffers is None and next(model.buffers(), None) is not None:
        args.ddp_broadcast_buffers = False
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def summed(accelerator: Accelerator, *numbers: float) -> list[float]:
    """Each number summed over all processes; every one of them has to ask."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    over_all: list[float] = accelerator.reduce(sums, "sum").tolist()
    return over_all


@contextmanager
def uneven(accelerator: Accelerator) -> Iterator[None]:
    """Data loaders made within it give each process its rows alone; made even by repeating some, those count twice."""
    evened, accelerator.even_batches = accelerator.even_batches, False
    try:
        yield
    finally:
        accelerator.even_batches = evened
