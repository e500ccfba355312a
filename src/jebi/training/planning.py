"""What a training is predicted to take, for the line at its start and for its report; and the budget it is kept to.

What is counted and chosen is `plan`'s and `training.engine`'s; this file asks them of a loaded model.
"""

import contextlib
import logging
import statistics
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from jebi.adapters.lora import LoraAdapter
from jebi.config import Storage
from jebi.models.device import free_bytes
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import placed
from jebi.plan.budget import budget_bytes
from jebi.plan.cards import present_card
from jebi.plan.inventory import CONTEXT_BYTES, GIB, Held, Pass, by_part, everything, total
from jebi.plan.passes import PassPlan
from jebi.plan.time import Load, step_time
from jebi.plan.words import words
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

logger = logging.getLogger(__name__)

_ROWS = 2000
"""Rows whose lengths are looked at."""


def allowed_bytes(device: torch.device, budget: float | str | None) -> int:
    """Memory that this process could still take, within a budget as `plan.budget` reads it.

    Raises:
        ConfigError: the budget is none.
    """
    free = free_bytes(device)
    if budget is None:
        return free
    if device.type == "cuda":
        whole = budget_bytes(budget, _memory(device)) - CONTEXT_BYTES
        return min(free, whole - torch.cuda.memory_allocated(device))
    return min(free, budget_bytes(budget, _memory(device)) - psutil.Process().memory_info().rss)


@contextlib.contextmanager
def within(device: torch.device, budget: float | str | None) -> Iterator[None]:
    """Within it torch's allocator on a card takes no more than the budget, less what CUDA's context takes."""
    if budget is None or device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = max(0, budget_bytes(budget, _memory(device)) - CONTEXT_BYTES) / _memory(device)
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def held_of(model: JebiForCausalLM, optimizer: str) -> Held:
    """A loaded model and its adapter as the inventory knows them."""
    forms: dict[type, Storage] = {NF4Weight: "nf4", Int8Weight: "int8"}
    weights = [linear.weight for path, linear in model.linears() if path != "lm_head"]
    storage: Storage = next((forms[type(weight)] for weight in weights if type(weight) in forms), "dense")
    if any(isinstance(weight, nn.Parameter) and weight.requires_grad for weight in weights):
        storage = "masters"
    lora = model.adapter.config if isinstance(model.adapter, LoraAdapter) else None
    return Held(
        model.model.shape, storage, model.dtype.itemsize, placed(model), lora, optimizer,
        model.compute == "fp8", model.device.type == "cuda",
    )  # fmt: skip


def predict(model: JebiForCausalLM, plan: PassPlan, args: TrainingArguments, rows: Any) -> dict[str, Any]:
    """The peak, its parts and, on a known card, a step's time; told on the way.

    Args:
        model: set up as planned.
        plan: what was chosen.
        args: the trainer's.
        rows: token rows to train on; of a stream every pass is taken for a full one.
    """
    held = held_of(model, OptimizerNames(args.optim).value)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    mean, most = float(plan.tokens), plan.tokens
    row = mean / batch
    if isinstance(rows, Dataset) and len(rows):
        lengths = [sum(each) for each in rows[:_ROWS]["lengths"]]
        row = statistics.fmean(lengths)
        mean = batch * row
        most = min(plan.tokens, batch * max(lengths), int(mean + 2 * statistics.pstdev(lengths) * batch**0.5))
        if min(lengths) == max(lengths):
            most = max(plan.tokens // lengths[0], 1) * lengths[0] if plan.tokens < mean else int(mean)
    made = Pass(max(1, most), plan.checkpointing, plan.chunk, plan.keep_weights, plan.kept_layers)
    items = everything(held, made)
    # A report measures what the allocator reserves, and CUDA's context is beside that.
    peak = total(items) - (CONTEXT_BYTES if held.on_card else 0)
    found: dict[str, Any] = {"peak_gb": peak / GIB, "parts_gb": {part: size / GIB for part, size in by_part(items)}}
    line = f"Plan: {peak / GIB:.2f} GB at the peak, {words(plan, held.places, held, len(held.shape.layers))}"
    if held.on_card and (card := present_card(torch.cuda.get_device_name(model.device), _memory(model.device))):
        step = step_time(held, made, Load(mean, row, passes=max(1.0, mean / made.tokens)), card)
        found["step_seconds"] = step.seconds
        line += f", about {step.seconds:.2f} s a step"
    logger.info(f"{line}.")
    for item in items:
        logger.debug(f"  {item.name} ({item.part}, {item.where}): {item.bytes / GIB:.3f} GB")
    return found
