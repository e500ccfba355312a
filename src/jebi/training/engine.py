"""How one optimizer step's passes run: by replaying graphs on a card, one by one through autograd elsewhere; gradients
of several processes are averaged behind them.

Which rows make a step, and what follows it, are the trainer's; what a pass computes is the model's.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from jebi.data.dealing import Ranks, passes_of
from jebi.data.heldout import inputs_of
from jebi.data.known_tokens import require_known_tokens
from jebi.data.passes import Batch, Pass, flat_of, longest
from jebi.models.compute import require_card, require_layers
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import movable, place, placed, resolve
from jebi.plan.held import Held
from jebi.plan.inventory import trained
from jebi.plan.passes import CPU_PASS_TOKENS, GPU_PASS_TOKENS, PassPlan, Room, choose, room_beside
from jebi.plan.places import Relief, best, reliefs
from jebi.plan.present import card_of, host_bytes
from jebi.plan.time import carried_bytes
from jebi.training.budget import allowed_bytes
from jebi.training.flat import FlatGradients
from jebi.training.graphs import Padded, PassGraphs, padded
from jebi.training.pass_settings import Settings, drops_out
from jebi.training.planning import job_of
from jebi.training.reduction import Reduction
from jebi.training.room import require_room

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, dict[str, object], Tensor | int], Tensor]
"""The trainer's own way from the model's keywords to the loss of a pass."""


def make_plan(model: JebiForCausalLM, settings: Settings) -> PassPlan:
    """Choose the pass size, and what layers keep where the model leaves it open; set the model up for it.

    Where nothing else fits, embedding and head leave the card, as far as the model leaves that open.

    Raises:
        ConfigError: the model's ``compute`` cannot be had with this device or adapter.
        OutOfMemoryError: the budget is too small, or the longest row surely does not fit.
    """
    backbone, device = model.model, model.device
    if model.compute != "auto":
        require_card(model.compute, device, model.dtype)
        require_layers(model.compute, backbone)
    job = job_of(model, settings)
    element = model.dtype.itemsize
    limit = job.pass_limit(CPU_PASS_TOKENS if device.type == "cpu" else GPU_PASS_TOKENS)
    room, options = _room(model, settings, job.held), _reliefs(model)
    now = next((o.frees for o in options if resolve(o.places, backbone.shape.tied, device) == placed(model)), 0)
    relief, plan = best(
        options,
        now,
        room,
        lambda free: choose(backbone.shape, element, free, job.largest, job.asked, limit, job.row is None),
    )
    if settings.pass_tokens is not None:
        plan = dataclasses.replace(plan, tokens=settings.pass_tokens)
    if not plan.fits:
        places = resolve(relief.places, backbone.shape.tied, device)
        require_room(model, settings, plan, room.card + relief.frees - now, places)
    place(model, relief.places)
    if relief != options[0]:
        at = placed(model)
        logger.warning(f"training needs the room on the card, so: embedding='{at.embedding}', head='{at.head}'.")
    backbone.checkpointing, backbone.chunk_tokens = plan.checkpointing, plan.chunk
    backbone.kept_layers, backbone.shipped_layers = plan.kept_layers, plan.shipped_layers
    if device.type == "cuda":
        lay_together(model, plan)
    return plan


def lay_together(model: JebiForCausalLM, plan: PassPlan) -> None:
    """Lay the layers' maps together as planned."""
    model.model.stack(plan.keep_weights, model.compute)


def chosen(model: JebiForCausalLM, plan: PassPlan) -> dict[str, Any]:
    """What was chosen for a training, for its report."""
    compute = str(model.dtype).removeprefix("torch.") if model.compute == "auto" else model.compute
    of_plan = {"pass_tokens": plan.tokens, "checkpointing": plan.checkpointing, "compute": compute}
    of_plan |= {"kept_layers": plan.kept_layers, "shipped_layers": plan.shipped_layers}
    return of_plan | dataclasses.asdict(placed(model))


def _room(model: JebiForCausalLM, settings: Settings, held: Held) -> Room:
    """Memory for training beside what is there, and what weights would take of it."""
    device = model.device
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    free = allowed_bytes(device, settings.budget)
    free -= trained(sizes, settings.optimizer).bytes + held.cast_bytes
    if device.type == "cpu":
        return room_beside(held, free)
    return room_beside(held, free, host_bytes(device), carried_bytes(held, card_of(device)))


def _reliefs(model: JebiForCausalLM) -> list[Relief]:
    """Places of embedding and head to try; on a CPU there is nothing to be relieved of."""
    if model.device.type == "cpu":
        return [Relief(model.places, 0)]
    return reliefs(model.model.shape, model.dtype.itemsize, movable(model))


class Engine:
    """Runs passes of one model, which `make_plan` has set up."""

    def __init__(
        self, model: JebiForCausalLM, plan: PassPlan, settings: Settings, accelerator: Accelerator, ranks: Ranks
    ):
        self._model, self._plan, self._settings, self._accelerator = model, plan, settings, accelerator
        self._places, self._stacked = placed(model), self._count_stacked()
        self._ranks = ranks
        self._drops_out = drops_out(model)
        # An adapter is small enough to be moved.
        moved = model.adapter is not None
        self._reduction = Reduction(self._trained(), moved) if ranks.count > 1 else None
        self._graphs: PassGraphs | None = None
        self.passing = False
        """Whether a step's passes are under way, which leave the weights as the last step made them."""
        self._open_graphs()

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _open_graphs(self) -> None:
        if not self._settings.graphs:
            return
        hindrance = PassGraphs.hindrance(self._model)
        if hindrance is None:
            keywords = {"label_smoothing": self._settings.label_smoothing}
            gradients = FlatGradients(self._trained()) if self._reduction is None else self._reduction.gradients
            self._graphs = PassGraphs(self._model, self._accelerator.backward, keywords, gradients)
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

    def passes(self, batches: list[Batch]) -> list[Pass | Padded]:
        """This process's passes of a step's rows, and what the host can do for them: where graphs run, pad and pin."""
        for batch in batches:
            require_known_tokens(flat_of(batch), self._model.model.shape.vocabulary)
        # Tokens held once would also share one dropout mask.
        share = not self._drops_out and self._model.shares_beginnings(longest(batches))
        passes = passes_of(batches, self._plan.tokens, share, self._ranks)
        return [padded(part, pinned=True) for part in passes] if self._graphs is not None else [*passes]

    def run(self, passes: list[Pass | Padded], items: Tensor | int, loss_of: Loss, stop: bool = False) -> Tensor:
        """Forward and backward of a step's passes; the sum of their losses, over all processes, on the device.

        Args:
            passes: of one step, as `passes` made them.
            items: learnt tokens of the step, over all processes, by which the losses are divided.
            loss_of: the trainer's own way to a pass's loss, times the number of processes, over which it is averaged.
            stop: whether this process was asked to stop after the step.
        """
        self.passing = True
        self._restore()
        device = self._accelerator.device
        total = torch.zeros((), device=device)
        if self._reduction is not None:
            self._reduction.gradients.begin()
        for part in passes:
            if isinstance(part, Padded):
                assert self._graphs is not None, "padded for it"
                total += self._graphs.run(part, items / self._ranks.count)
                continue
            inputs = inputs_of(part, device) | {"label_smoothing": self._settings.label_smoothing}
            loss = loss_of(self._model, inputs, items)
            self._accelerator.backward(loss)
            total += loss.detach()
        if self._reduction is not None:
            total = self._reduction.run(total, stop)
        self.passing = False
        return total

    def stopping(self, asked: bool) -> bool:
        """Whether the training is to stop: where it was ``asked`` for, in one process, or in any of several."""
        return asked if self._reduction is None else self._reduction.stopping()
