"""How one optimizer step's passes run: by replaying graphs on a card, one by one through autograd elsewhere.

Which rows make a step, and what follows it, are the trainer's; what a pass computes is the model's.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from jebi.data.heldout import inputs_of
from jebi.data.passes import Pass
from jebi.models.compute import require_card, require_layers
from jebi.models.device import free_bytes
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import movable, place, placed, resolve
from jebi.nn.fp8_product import Fp8Product
from jebi.plan.passes import CPU_PASS_TOKENS, GPU_PASS_TOKENS, TRAINED_BYTES, PassPlan, Room, choose, head_cost
from jebi.plan.places import Relief, reliefs
from jebi.training.graphs import Padded, PassGraphs, padded

logger = logging.getLogger(__name__)

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
    """Choose the pass size, and what layers keep where the model leaves it open; set the model up for it.

    Where nothing else fits, embedding and head leave the card, as far as the model leaves that open.

    Raises:
        ConfigError: the model's ``compute`` cannot be had with this device or adapter.
    """
    backbone, device, fp8 = model.model, model.device, model.compute == "fp8"
    if fp8:
        require_card(device, model.dtype)
        require_layers(backbone)
    asked = None if getattr(model, "auto_checkpointing", False) else backbone.checkpointing
    if settings.recompute and asked in (None, "none"):
        asked = "offload" if settings.offload else "recompute"
    element, limit = model.dtype.itemsize, CPU_PASS_TOKENS if device.type == "cpu" else GPU_PASS_TOKENS
    room, options = _room(model, fp8), _reliefs(model)
    now = next((o.frees for o in options if resolve(o.places, backbone.shape.tied, device) == placed(model)), 0)
    plans = []
    for option in options:
        freed = dataclasses.replace(room, card=room.card + option.frees - now)
        plan = choose(backbone.shape, element, freed, settings.longest, asked, limit)
        moved = option.places.head == "host" and options[0].places.head != "host"
        plans.append((plan.cost + (head_cost(plan.tokens) if moved else 0), plan))
    best = min(range(len(plans)), key=lambda number: plans[number][0])
    if not plans[best][1].fits:
        best = len(plans) - 1
        ways = "lower it, or " + ("" if asked in (None, "offload") else "leave use_gradient_checkpointing 'auto', or ")
        logger.warning(
            f"rows of max_seq_length={settings.longest} tokens may not fit into the {room.card / 2**30:.2f} GiB that "
            f"are free for training: {ways}free memory."
        )
    plan = plans[best][1]
    place(model, options[best].places)
    if best:
        at = placed(model)
        logger.warning(f"training needs the room on the card, so: embedding='{at.embedding}', head='{at.head}'.")
    backbone.checkpointing, backbone.chunk_tokens = plan.checkpointing, plan.chunk
    backbone.kept_layers = plan.kept_layers
    if device.type == "cuda":
        lay_together(model, plan)
    if settings.pass_tokens is None:
        return plan
    return dataclasses.replace(plan, tokens=settings.pass_tokens)


def lay_together(model: JebiForCausalLM, plan: PassPlan) -> None:
    """Lay the layers' maps together as planned."""
    model.model.stack(plan.keep_weights, model.compute == "fp8")


def chosen(model: JebiForCausalLM, plan: PassPlan) -> dict[str, Any]:
    """What was chosen for a training, for its report."""
    compute = str(model.dtype).removeprefix("torch.") if model.compute == "auto" else model.compute
    of_plan = {"pass_tokens": plan.tokens, "checkpointing": plan.checkpointing, "compute": compute}
    return of_plan | dataclasses.asdict(placed(model))


def _room(model: JebiForCausalLM, fp8: bool) -> Room:
    """Memory for training, and what weights would take of it."""
    backbone, device = model.model, model.device
    trained, _ = model.trainable_parameters()
    free = free_bytes(device) - TRAINED_BYTES * trained
    if fp8:
        free -= Fp8Product.BYTES * sum(layer.dense_values() for layer in backbone.decoder_layers())
    packed = model.packed_values()
    if device.type == "cpu" or not packed:
        return Room(free, host=0 if device.type == "cpu" else free_bytes(torch.device("cpu")))
    element, layer = model.dtype.itemsize, backbone.shape.layer
    # The largest group is gate and up.
    scratch = 2 * layer.ffn * layer.width * (1 if fp8 else element)
    weights = packed * (Fp8Product.BYTES if fp8 else element)
    return Room(free, weights, scratch, free_bytes(torch.device("cpu")))


def _reliefs(model: JebiForCausalLM) -> list[Relief]:
    """Places of embedding and head to try; on a CPU there is nothing to be relieved of."""
    if model.device.type == "cpu":
        return [Relief(model.places, 0)]
    return reliefs(model.model.shape, model.dtype.itemsize, movable(model))


class Engine:
    """Runs passes of one model, which `make_plan` has set up."""

    def __init__(self, model: JebiForCausalLM, plan: PassPlan, settings: Settings, accelerator: Accelerator):
        self._model, self._plan, self._settings, self._accelerator = model, plan, settings, accelerator
        self._places, self._stacked = placed(model), self._count_stacked()
        self._graphs: PassGraphs | None = None
        self._open_graphs()

    def _open_graphs(self) -> None:
        if not self._settings.graphs or self._accelerator.num_processes > 1:
            return
        hindrance = PassGraphs.hindrance(self._model)
        if hindrance is None:
            keywords = {"label_smoothing": self._settings.label_smoothing}
            self._graphs = PassGraphs(self._model, self._accelerator.backward, keywords)
        elif self._model.device.type != "cpu":
            logger.warning(f"passes are launched kernel by kernel, which short rows feel: {hindrance}.")

    def _count_stacked(self) -> int:
        return sum(layer.stacked is not None for layer in self._model.model.decoder_layers())

    def _restore(self) -> None:
        """Set the model up once more where `for_inference` in a callback took it apart: graphs read what is gone."""
        if self._count_stacked() < self._stacked:
            self._graphs = None
            place(self._model, self._places)
            lay_together(self._model, self._plan)
            self._open_graphs()

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
        self._restore()
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
