"""Every tensor that a process of a run holds, by name, with its bytes and its place, from the model's shape and the
settings alone.

This is the one count of memory, of models alone and of those that several processes train: `plan.passes` chooses with
it, `training.engine` allows for it, `jebi plan` shows it. What is chosen is not this file's, nor how long it takes. No
torch here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jebi.config import Storage
from jebi.config.limits import CHUNK_BYTES, DYNAMIC_BLOCK, SLICE_BYTES, TRAVELLING
from jebi.plan.activations import Pass, pass_bytes
from jebi.plan.held import Held, norms_of
from jebi.quant.footprint import weight_bytes

Where = Literal["card", "host", "disk"]
"""The device's memory, which without a card is the host's; host memory beside it; files."""

Part = Literal[
    "model", "adapter", "weights as multiplied", "activations", "workspace", "allocator", "libraries", "checkpoint"
]
"""What items are added up to for people."""

GIB = 2**30
CONTEXT_BYTES = int(0.85 * GIB)
"""What a card's driver, libraries and kernels take beside torch's allocator: 0.82 to 0.86 GiB in 24 trainings on an
H200."""
PROCESS_BYTES = int(0.65 * GIB)
"""Resident memory of a process that has loaded torch, transformers and a tokenizer (Linux, torch 2.13, SmolLM2)."""
OPTIMIZERS_8BIT = ("adamw_8bit", "adamw_bnb_8bit")
"""Names of the optimizer whose moments are in 8 bits; every other one is counted as Adam in float32."""
_LEAST_8BIT = 4096
"""Values of a matrix below which its moments are float32 (`training.optimizer`)."""
_KERNEL_SET, _FREE_SETS, _MOST_SETS = 45 * 2**20, 7, 64
"""Bytes of a set of oneDNN's kernels; how many sets are not seen, and how many are kept."""
KERNELS = "kernels that oneDNN keeps"
"""Name of the item that is no more than a guess."""
_FP8_BYTES = 1
"""A weight's bytes in 8-bit floats, of each copy: by rows for the forward, by columns for the backward."""


@dataclass(frozen=True)
class Item:
    """One tensor, or those of one kind."""

    name: str
    """What it is."""
    part: Part
    """What it belongs to."""
    bytes: int
    """Its size."""
    where: Where = "card"
    """Its place."""


def total(items: list[Item], where: Where = "card", part: Part | None = None) -> int:
    """Bytes of the items in a place, all of them or those of one part."""
    return sum(item.bytes for item in items if item.where == where and part in (None, item.part))


def model_items(held: Held) -> list[Item]:
    """The model as it is loaded."""
    shape, dense = held.shape, 4 if held.storage == "masters" else held.element
    values = shape.vocabulary * shape.layer.width
    size, places = values * dense, held.places
    biases = sum(one.outputs for _, one in held.maps() if one.bias) * dense
    norms = (len(shape.layers) * norms_of(shape.layer) + 1) * shape.layer.width * dense
    items = [
        Item(f"projections ({held.storage})", "model", held.parts),
        Item("norms and biases", "model", norms + biases),
    ]
    at_embedding: Where = "host" if places.embedding == "host" else "card"
    packed: dict[str, Storage] = {"nf4": "nf4", "int8": "int8"}
    if (form := packed.get(places.head)) is not None:
        head = Item(f"head ({form})", "model", weight_bytes(form, values, held.element))
        return [*items, Item("embedding", "model", size, at_embedding), head]
    if shape.tied:
        items.append(Item("embedding, which is the head", "model", size, at_embedding))
    else:
        at_head: Where = "host" if places.head == "host" else "card"
        items += [Item("embedding", "model", size, at_embedding), Item("head", "model", size, at_head)]
    return items


@dataclass(frozen=True)
class Trained:
    """Bytes of what training adds to the trained matrices themselves."""

    gradients: int
    """In one flat buffer, float32."""
    moments: int
    """The optimizer's."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.gradients + self.moments


def trained(sizes: list[int], optimizer: str) -> Trained:
    """What training adds to matrices of so many values, which `training.flat` lays out in blocks.

    Args:
        sizes: values of each.
        optimizer: `TrainingArguments.optim`.
    """
    padded = [-(-values // DYNAMIC_BLOCK) * DYNAMIC_BLOCK for values in sizes]
    moments = 0
    for values, size in zip(sizes, padded):
        # Two codes, and two float32 scales a block; small matrices have float32 moments (`training.optimizer`).
        eight = optimizer in OPTIMIZERS_8BIT and values >= _LEAST_8BIT
        moments += 2 * size + 2 * 4 * size // DYNAMIC_BLOCK if eight else 8 * size
    return Trained(4 * sum(padded), moments)


def adapter_items(held: Held) -> list[Item]:
    """What is trained, by every process alike: float32 masters, gradients, moments and, on a card, casts."""
    sizes = held.matrices
    more = trained(sizes, held.optimizer)
    spare = 4 * TRAVELLING if held.world.ranks > 1 else 0
    items = [
        Item("gradients (float32)", "adapter", more.gradients + spare),
        Item("optimizer's moments", "adapter", more.moments),
    ]
    if held.cast_bytes:
        items.append(Item("casts of the adapter", "adapter", held.cast_bytes))
    if held.storage == "masters":
        return items
    return [Item("adapter (float32)", "adapter", 4 * (sum(sizes) + held.frozen_values)), *items]


def kept_weight_bytes(held: Held) -> int:
    """What keeping packed weights as they are multiplied takes; 0 where none are packed, or layers are divided."""
    if not held.packed or held.world.shares > 1:
        return 0
    return (_forward_bytes(held) + (_FP8_BYTES if held.fp8 else 0)) * held.packed_values


def _forward_bytes(held: Held) -> int:
    """Of a weight as the forward multiplies it; without 8-bit floats the backward reads the same copy."""
    return _FP8_BYTES if held.fp8 and not held.exact_forward else held.element


def scratch_bytes(held: Held) -> int:
    """What the largest group of weights takes that is dequantised at every use: gate and up, on a CPU one of them."""
    if not held.packed:
        return 0
    layer = held.shape.layer
    return (2 if held.on_card else 1) * layer.ffn * layer.width * _forward_bytes(held)


def weight_items(held: Held, keep: bool) -> list[Item]:
    """What multiplying by the weights takes beside them, the same for every pass.

    Args:
        held: the model.
        keep: whether packed weights are kept as they are multiplied.
    """
    items = []
    if held.packed and keep:
        items.append(Item("weights kept as multiplied", "weights as multiplied", kept_weight_bytes(held)))
    elif held.packed:
        items.append(Item("weights of one group, dequantised", "workspace", scratch_bytes(held)))
    return items + fixed_items(held)


def fixed_items(held: Held) -> list[Item]:
    """Those of them in which a plan has no choice."""
    items = []
    if held.fp8 and (dense := held.projected - held.packed_values):
        copies = 1 if held.exact_forward else 2
        items.append(Item("weights in 8-bit floats", "weights as multiplied", copies * _FP8_BYTES * dense))
    if held.gathered:
        items.append(Item("layers gathered from all processes", "workspace", held.gathered))
    if held.places.head in ("host", "nf4", "int8"):
        # Their logits are more than those of a dense head where a processor computes.
        logits = 0 if held.on_card else 2 * CHUNK_BYTES
        items.append(Item("slices of the head", "workspace", 2 * SLICE_BYTES + logits))
    if "lm_head" in held.trained_tables:
        # Cast, its gradient, and what a chunk adds to that, while all layers keep theirs.
        each = (held.element if held.element < 4 else 0) + 4 + 4
        items.append(Item("the head's gradient", "workspace", each * held.shape.vocabulary * held.shape.layer.width))
    return items


def pass_items(held: Held, made: Pass) -> list[Item]:
    """What a pass takes at its peak: the last layer's backward, or the loss before it, while all layers keep theirs."""
    size = pass_bytes(held.shape, held.element, made, held.on_card, held.at_work)
    items = [Item("kept activations", "activations", size.kept)]
    if size.work >= size.loss:
        items.append(Item("a layer's backward", "workspace", size.work))
    else:
        items.append(Item("the loss of a chunk", "workspace", size.loss))
    items += weight_items(held, made.keep_weights)
    if held.on_card:
        items += [Item("inputs", "workspace", size.inputs), Item("pinned inputs", "workspace", size.inputs, "host")]
    if size.host_inputs:
        items.append(Item("inputs of layers, pinned", "activations", size.host_inputs, "host"))
    if size.host_wide:
        items.append(Item("gate and up, pinned", "activations", size.host_wide, "host"))
    return items


SLACK_BYTES = GIB // 5
"""What torch's allocator reserves in pages (`models.device`) beyond what is counted here, cuBLAS's tenth of a GiB among
it. In 24 trainings on an H200 0.03 to 0.17 GiB lay idle, from 3B on at rank 64 0.24 to 0.38, where as much too much is
counted. Without pages it is more, and nobody can predict how much."""


def host_slack_items(held: Held, made: Pass, passing: int) -> list[Item]:
    """What stays resident on a host beyond what is in use, of so many bytes of a pass that come and go.

    The C library gives back what it can; and in 16 bits oneDNN keeps every product's kernels for every size of a pass,
    up to 1,024 of them. SmolLM2's demo, a peak of 1.68 GB in float32 (1.55 without this); in bfloat16 1.57, 1.54, 1.79
    and 3.01 GB after 8, 10, 16 and 40 steps of different sizes, of which the first few take the place of freed memory.
    Of other models and processors that is a guess, for which nothing is refused (`plan.refusal`).
    """
    kernels = _KERNEL_SET * max(0, min(made.sizes, _MOST_SETS) - _FREE_SETS) if held.element < 4 else 0
    items = [Item("what C's allocator keeps", "allocator", passing * 15 // 100)]
    return items + ([Item(KERNELS, "allocator", kernels)] if kernels else [])


def checkpoint_items(held: Held, checkpoints: int) -> list[Item]:
    """Files of a run: adapter and optimizer of each checkpoint, and the adapter at its end."""
    sizes = held.matrices
    masters, moments = 4 * sum(sizes), trained(sizes, held.optimizer).moments
    return [Item("adapter and checkpoints", "checkpoint", masters + checkpoints * (masters + moments), "disk")]


def everything(held: Held, made: Pass, checkpoints: int = 0) -> list[Item]:
    """All that a run holds while it trains."""
    items = [*model_items(held), *adapter_items(held), *pass_items(held, made), *checkpoint_items(held, checkpoints)]
    if not held.on_card:
        items += host_slack_items(held, made, total(pass_items(held, made)) - total(fixed_items(held)))
        return [*items, Item("Python and its libraries", "libraries", PROCESS_BYTES)]
    items.append(Item("what the allocator keeps", "allocator", SLACK_BYTES))
    host = Item("Python and its libraries", "libraries", 2 * PROCESS_BYTES, "host")
    return [*items, Item("CUDA's context", "libraries", CONTEXT_BYTES), host]


def by_part(items: list[Item], where: Where = "card") -> Iterator[tuple[Part, int]]:
    """The parts of a place that have any bytes, in the items' order."""
    for part in dict.fromkeys(item.part for item in items if item.where == where):
        if size := total(items, where, part):
            yield part, size
