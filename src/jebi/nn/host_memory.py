"""Tensors of one forward pass in host memory: copied out while the card works on, and back before they are asked for.

Slots are filled in the order of the layers and emptied in the opposite one. Copies run on a stream of their own, to and
from pinned memory that is kept for the process (pinning a gigabyte takes longer than copying it ten times); the host
waits for none of them. What a copy reads stays referenced until the card's own stream waits for that copy, which it
does when the next layer begins. `Tensor.record_stream` would do as well for safety, but not for size: such memory
returns when the host happens to look after the copy has ended, and the host runs layers ahead of the card, so that it
would take new memory meanwhile.

Off a card nothing is copied: slots then hold what they were given.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from jebi.errors import ModelError

_SLAB = 64 * 2**20
"""Bytes of one piece of pinned memory; a power of two, to which torch would round it up. Tensors run over their ends,
so that one pool serves every shape."""
_ALIGNED = 256


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in host memory."""

    start: int
    """Its first byte, counted through all slabs."""
    end: int
    """The first byte behind it."""
    like: Tensor
    """Its sizes and strides, on the meta device."""


@dataclass
class _Slot:
    here: list[Tensor] = field(default_factory=list)
    """The tensors on the card, while they are there."""
    places: list[_Place] = field(default_factory=list)
    copied: torch.cuda.Event | None = None
    """When the latest copy ends."""


@dataclass
class _Pool:
    """What outlives a pass."""

    stream: torch.cuda.Stream
    slabs: list[Tensor] = field(default_factory=list)


class HostMemory:
    """A stack of slots, one for each layer that keeps something in host memory."""

    def __init__(self, device: torch.device, lane: int = 0):
        """An empty stack.

        Args:
            device: where the tensors come from.
            lane: stacks of different lanes copy on streams of their own; within one, copies wait for one another.
        """
        self._device = device
        self._pool = _pool(device, lane) if device.type == "cuda" else None
        self._slots: list[_Slot] = []
        self._slabs: list[Tensor] = []

    def begin(self) -> int:
        """The number of a new slot; what earlier ones hold on the card is let go."""
        for slot in self._slots[-1:]:
            self._let_go(slot)
        self._slots.append(_Slot())
        return len(self._slots) - 1

    def put(self, number: int, *tensors: Tensor) -> None:
        """Keep these too; nothing may write over them before the next slot begins."""
        slot = self._slots[number]
        if self._pool is None:
            slot.here.extend(tensors)
            return
        # Copied as one run of bytes, in whichever order their dimensions lie.
        tensors = tuple(tensor if _dense(tensor) else tensor.clone() for tensor in tensors)
        slot.here.extend(tensors)
        self._pool.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._pool.stream):
            for tensor in tensors:
                place = self._place(tensor)
                slot.places.append(place)
                for part, slab in self._parts(place, tensor):
                    slab.copy_(part, non_blocking=True)
            slot.copied = self._pool.stream.record_event()

    def take(self, number: int) -> list[Tensor]:
        """What a slot holds, which it then holds no more; the slot before it starts on its way back.

        Raises:
            ModelError: it was taken before.
        """
        slot = self._slots[number]
        self._fetch(slot)
        if not slot.here:
            raise ModelError(
                "activations in host memory serve one backward: set use_gradient_checkpointing=True instead of "
                '"unsloth" to go through the graph again.'
            )
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
        tensors = slot.here
        self._slots[number] = _Slot()
        if number:
            self._fetch(self._slots[number - 1])
        self._give_back()
        return tensors

    def _fetch(self, slot: _Slot) -> None:
        """Start the copies back, unless the tensors are here or on their way."""
        if slot.here or not slot.places:
            return
        assert self._pool is not None
        slot.here = [torch.empty_like(place.like, device=self._device) for place in slot.places]
        # Their memory may still be in use by what was launched before.
        self._pool.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._pool.stream):
            for tensor, place in zip(slot.here, slot.places):
                for part, slab in self._parts(place, tensor):
                    part.copy_(slab, non_blocking=True)
            slot.copied = self._pool.stream.record_event()

    def _let_go(self, slot: _Slot) -> None:
        """Forget the tensors on the card: what is launched from now on runs when their copies have ended."""
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)
            slot.here = []

    def _place(self, tensor: Tensor) -> _Place:
        """Room for a tensor behind what is there."""
        assert self._pool is not None
        start = self._end()
        end = start + -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        while len(self._slabs) * _SLAB < end:
            free = self._pool.slabs
            self._slabs.append(free.pop() if free else torch.empty(_SLAB, dtype=torch.uint8, pin_memory=True))
        return _Place(start, end, torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"))

    def _parts(self, place: _Place, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The bytes of a tensor as parts that lie in one slab each, beside their places there."""
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        first, end = place.start, place.start + flat.numel()
        edges = [first, *range((first // _SLAB + 1) * _SLAB, end, _SLAB), end]
        return [
            (flat[a - first : b - first], self._slabs[a // _SLAB][a % _SLAB : a % _SLAB + b - a])
            for a, b in pairwise(edges)
        ]

    def _end(self) -> int:
        """The first byte behind everything."""
        return max((place.end for slot in self._slots for place in slot.places), default=0)

    def _give_back(self) -> None:
        """Pinned memory that is not in use goes to the pool: later copies run behind these, on the same stream."""
        while self._pool is not None and (len(self._slabs) - 1) * _SLAB >= self._end():
            self._pool.slabs.append(self._slabs.pop())

    def __del__(self) -> None:
        """See to what is left where a pass broke off: what copies read and write must outlast them."""
        for slot in self._slots:
            self._let_go(slot)
        self._slots = []
        self._give_back()


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor's values fill one run of memory, in whichever order."""
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
    return tensor.numel() == 1 + sum(steps)


@lru_cache(maxsize=8)
def _pool(device: torch.device, lane: int) -> _Pool:
    return _Pool(torch.cuda.Stream(device))
