"""``nn.host_memory``: what is put comes back, off a card and as on one, of which streams and pinned memory stand in.

On a card: `tests/nn/long_rows_on_card.py`.
"""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from jebi.errors import ModelError
from jebi.nn import host_memory
from jebi.nn.host_memory import HostMemory

CPU = torch.device("cpu")


class Stream:
    """Notes what waits for what; its work is done at once."""

    def __init__(self) -> None:
        self.waits: list[Any] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits.append(other)

    def wait_event(self, event: object) -> None:
        self.waits.append(event)

    def record_event(self) -> object:
        return object()


def tensors(layer: int) -> list[Tensor]:
    """Of several dtypes and layouts, larger and smaller than a piece of pinned memory."""
    generator = torch.Generator().manual_seed(layer)
    return [
        torch.randn(70 + layer, 16, generator=generator).bfloat16(),
        torch.randn(1, 3, 5, generator=generator).transpose(1, 2),
        torch.randn(2, 40, 4, 1, generator=generator),
        torch.randn(6, 9, generator=generator)[:, :7],
    ]


@pytest.fixture(params=["off a card", "copied"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    made = HostMemory(CPU)
    if request.param == "copied":
        own, main, empty = Stream(), Stream(), torch.empty
        monkeypatch.setattr(host_memory, "_SLAB", 1024)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
        made._pool = host_memory._Pool(own)  # type: ignore[arg-type]
    return made


def test_what_is_put_comes_back_in_the_opposite_order(memory: HostMemory) -> None:
    for layer in range(4):
        slot = memory.begin()
        memory.put(slot, tensors(layer)[0])
        memory.put(slot, *tensors(layer)[1:])
    for layer in reversed(range(4)):
        for value, expected in zip(memory.take(layer), tensors(layer), strict=True):
            assert torch.equal(value, expected)
            assert value.stride() == expected.stride() or not host_memory._dense(expected)


def test_a_slot_is_taken_once(memory: HostMemory) -> None:
    memory.put(memory.begin(), *tensors(0))
    memory.take(0)
    with pytest.raises(ModelError, match="use_gradient_checkpointing=True"):
        memory.take(0)


def test_on_a_card_no_more_than_two_layers_are_there_at_a_time(memory: HostMemory) -> None:
    if memory._pool is None:
        pytest.skip("nothing is copied")
    for layer in range(4):
        memory.put(memory.begin(), *tensors(layer))
        assert [bool(slot.here) for slot in memory._slots] == [False] * layer + [True]
    for layer in reversed(range(4)):
        memory.take(layer)
        assert [bool(slot.here) for slot in memory._slots[:layer]] == [False] * (layer - 1) + [True] * (layer > 0)


def test_pinned_memory_goes_back_to_the_pool(memory: HostMemory) -> None:
    pool = memory._pool
    if pool is None:
        pytest.skip("nothing is copied")
    for layer in range(2):
        memory.put(memory.begin(), *tensors(layer))
    held = {slab.data_ptr() for slab in memory._slabs}
    memory.take(1)
    assert 2 < len(pool.slabs) < len(held), "what the first layer is read from stays"
    memory.take(0)
    assert {slab.data_ptr() for slab in pool.slabs} == held
    later = HostMemory(CPU)
    later._pool = pool
    later.put(later.begin(), *tensors(0))
    assert {slab.data_ptr() for slab in later._slabs} < held
    del later  # as when a pass breaks off
    assert {slab.data_ptr() for slab in pool.slabs} == held
