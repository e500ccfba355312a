"""How one optimizer step's passes run: by replaying graphs on a card, one by one through autograd elsewhere.

Which rows make a step, and what follows it, are the trainer's; what a pass computes is the model's.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from jebi.data.heldout import inputs_of
from jebi.data.passes import Pass
from jebi.models.hf import JebiForCausalLM
from jebi.plan.passes import CPU_PASS_TOKENS, GPU_PASS_TOKENS, TRAINED_BYTES, PassPlan, choose
from jebi.training.graphs import Padded, PassGraphs, padded
from jebi.training.report import free_bytes

Loss = Callable[[nn.Module, dict[str, object], Tensor | int], Tensor]
"""The trainer's own way from the model's keywords to the loss of a pass."""


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


def settings_of(args: TrainingArguments, longest: int, pass_tokens: int | None, graphs: bool) -> Settings:
    """The trainer's arguments as they concern passes."""
    recompute = args.gradient_checkpointing_kwargs or {}
    assert not isinstance(recompute, str), "TrainingArguments turns text into a dictionary"
    wanted, offload = bool(args.gradient_checkpointing), bool(recompute.get("offload"))
    return Settings(longest, pass_tokens, wanted, offload, args.label_smoothing_factor, graphs)


def make_plan(model: JebiForCausalLM, settings: Settings) -> PassPlan:
    """Choose the pass size, and what layers keep where the model leaves it open; set the model up for it."""
    backbone, device = model.model, model.device
    asked = None if getattr(model, "auto_checkpointing", False) else backbone.checkpointing
    if settings.recompute and asked in (None, "none"):
        asked = "offload" if settings.offload else "recompute"
    element, limit = model.dtype.itemsize, CPU_PASS_TOKENS if device.type == "cpu" else GPU_PASS_TOKENS
    trained, _ = model.trainable_parameters()
    free = free_bytes(device) - TRAINED_BYTES * trained
    weights = model.packed_values() * element if device.type == "cuda" else 0
    host = free_bytes(torch.device("cpu")) if device.type == "cuda" else 0
    plan = choose(backbone.shape, element, free, settings.longest, asked, limit, weights, host)
    backbone.checkpointing, backbone.chunk_tokens = plan.checkpointing, plan.chunk
    if device.type == "cuda":
        backbone.stack(plan.keep_weights)
    if settings.pass_tokens is None:
        return plan
    return replace(plan, tokens=settings.pass_tokens)


class Engine:
    """Runs passes of one model, which `make_plan` has set up."""

    def __init__(self, model: JebiForCausalLM, settings: Settings, accelerator: Accelerator):
        self._settings, self._accelerator = settings, accelerator
        self._graphs: PassGraphs | None = None
        if settings.graphs and accelerator.num_processes == 1 and PassGraphs.serves(model):
            keywords = {"label_smoothing": settings.label_smoothing}
            self._graphs = PassGraphs(model, accelerator.backward, keywords)

    def prepare(self, passes: list[Pass]) -> list[Pass | Padded]:
        """What the host can do for them beforehand: where graphs run, padding and pinning."""
        return [padded(part, pinned=True) for part in passes] if self._graphs is not None else [*passes]

    def run(self, model: nn.Module, passes: list[Pass | Padded], items: Tensor | int, loss_of: Loss) -> Tensor:
        """Forward and backward of a step's passes; the sum of their losses, on the device.

        Args:
            model: as the accelerator wrapped it.
            passes: of one step, as `prepare` made them.
            items: learnt tokens of the step, over all processes, by which the losses are divided.
            loss_of: the trainer's own way to a pass's loss.
        """
        device = self._accelerator.device
        total = torch.zeros((), device=device)
        for index, part in enumerate(passes):
            if isinstance(part, Padded):
                assert self._graphs is not None, "padded for it"
                total += self._graphs.run(part, items)
                continue
            last = index == len(passes) - 1
            with contextlib.nullcontext() if last else self._accelerator.no_sync(model):
                inputs = inputs_of(part, device) | {"label_smoothing": self._settings.label_smoothing}
                loss = loss_of(model, inputs, items)
                self._accelerator.backward(loss)
            total += loss.detach()
        return total
