"""A training's processes and cards: what it needs over several of them beside Trainer's own handling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments


def suit(args: TrainingArguments, model: PreTrainedModel) -> None:
    """Settle what is left open: 4-bit weights are not sent anew every step; every adapter takes part in every pass."""
    args.dataloader_pin_memory = False  # Rows go to the card as passes, which are pinned.
    args.logging_nan_inf_filter = False  # Such a loss stops the run; to look for it at every batch waits for the card.
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


def on_host(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose batches stay on the host, where they are cut; from the card they would be fetched back.

    One that deals a stream to several processes sends its batches from card to card, and is left as it is.
    """
    if isinstance(loader, DataLoaderShard):
        loader.device = None
    return loader


@contextmanager
def uneven(accelerator: Accelerator) -> Iterator[None]:
    """Data loaders made within it give each process its rows alone; made even by repeating some, those count twice."""
    evened, accelerator.even_batches = accelerator.even_batches, False
    try:
        yield
    finally:
        accelerator.even_batches = evened
