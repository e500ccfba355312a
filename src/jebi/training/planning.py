"""A loaded model and a trainer's settings as plans see them, and what is predicted: told at the start, and reported.

What is counted is `plan.inventory`'s, and what is chosen `training.engine`'s.
"""

import dataclasses
import logging
import math
from typing import Any

from torch import nn

from jebi.adapters.lora import LoraAdapter
from jebi.config import Checkpointing, Storage
from jebi.config.launched import ALONE, World
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import movable, placed
from jebi.plan.held import Held
from jebi.plan.inventory import CONTEXT_BYTES, GIB, by_part, everything, total
from jebi.plan.jobs import Job
from jebi.plan.passes import PassPlan
from jebi.plan.present import card_of
from jebi.plan.time import step_time
from jebi.plan.words import words
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight
from jebi.training.pass_settings import Settings

logger = logging.getLogger(__name__)


def held_of(model: JebiForCausalLM, optimizer: str, world: World = ALONE) -> Held:
    """A loaded model and its adapter as the inventory knows them."""
    forms: dict[type, Storage] = {NF4Weight: "nf4", Int8Weight: "int8"}
    weights = [linear.weight for path, linear in model.linears() if path != "lm_head"]
    storage: Storage = next((forms[type(weight)] for weight in weights if type(weight) in forms), "dense")
    if any(isinstance(weight, nn.Parameter) and weight.requires_grad for weight in weights):
        storage = "masters"
    lora = model.adapter.config if isinstance(model.adapter, LoraAdapter) else None
    packed = storage in ("nf4", "int8")
    dense = sum(layer.dense_values() for layer in model.model.decoder_layers()) if packed else 0
    return Held(
        model.model.shape, storage, model.dtype.itemsize, placed(model), lora, optimizer,
        model.compute != "auto", model.device.type == "cuda", dense, world, model.compute == "fp8_backward",
    )  # fmt: skip


def asked_of(model: JebiForCausalLM, settings: Settings) -> Checkpointing | None:
    """What layers are to keep, where the model or the trainer's arguments say so."""
    asked = None if getattr(model, "auto_checkpointing", False) else model.model.checkpointing
    if settings.recompute and asked in (None, "none"):
        return "offload" if settings.offload else "recompute"
    return asked


def job_of(model: JebiForCausalLM, settings: Settings) -> Job:
    """A training of a loaded model as plans see it."""
    held = held_of(model, settings.optimizer, settings.world)
    rows, asked = settings.rows, asked_of(model, settings)
    job = Job(
        held, settings.longest, settings.batch, settings.steps, asked, movable(model), pass_tokens=settings.pass_tokens
    )
    if rows is None or (rows.deviation == 0 and not rows.common):
        return job
    mean = min(rows.mean, settings.longest)
    return dataclasses.replace(job, row=mean, spread=rows.deviation, common=min(rows.common, mean))


def predict(model: JebiForCausalLM, plan: PassPlan, settings: Settings) -> dict[str, Any]:
    """The peak of a process, its parts and, where its rates are known, a step's time; told on the way.

    Args:
        model: set up as planned.
        plan: what was chosen.
        settings: by which it was; of a stream every row is taken for a full one.
    """
    job = job_of(model, settings)
    held = job.held
    made = plan.made(job.filled(plan.tokens), job.sizes)
    items = everything(held, made)
    # A report measures what the allocator reserves, and CUDA's context is beside that.
    peak = total(items) - (CONTEXT_BYTES if held.on_card else 0)
    found: dict[str, Any] = {"peak_gb": peak / GIB, "parts_gb": {part: size / GIB for part, size in by_part(items)}}
    each = f" in each of {held.world.ranks} processes" if held.world.ranks > 1 else ""
    line = f"Plan: {peak / GIB:.2f} GB at the peak{each}, {words(plan, held.places, job)}"
    step = step_time(held, made, job.load(made.tokens), card_of(model.device))
    if math.isfinite(step.seconds):
        found["step_seconds"] = step.seconds
        line += f", about {step.seconds:.2f} s a step"
    logger.info(f"{line}.")
    for item in items:
        logger.debug(f"  {item.name} ({item.part}, {item.where}): {item.bytes / GIB:.3f} GB")
    return found
