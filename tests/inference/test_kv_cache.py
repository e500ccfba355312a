"""The static cache holds what is written, where it is written, however it grows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jebi.inference.kv_cache import STEP, StaticCache, slots_for

CPU = torch.device("cpu")


def cache(batch: int = 2) -> StaticCache:
    """Of 3 layers, 2 key heads of 4 numbers."""
    layer = SimpleNamespace(kv_heads=2, head_dim=4)
    shape: Any = SimpleNamespace(layer=layer, layers=[layer] * 3)
    return StaticCache(shape, batch, torch.float32, CPU)


@pytest.mark.parametrize(("tokens", "slots"), [(1, 256), (256, 256), (257, 512), (513, 1024), (4224, 8192)])
def test_sizes_are_steps(tokens: int, slots: int) -> None:
    assert slots_for(tokens) == slots


def test_what_is_written_stays_when_it_grows() -> None:
    made = cache()
    assert made.reserve(3)
    assert not made.reserve(STEP)
    rows, slots = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    keys, values = torch.randn(2, 3, 2, 4)
    made.write(1, (rows, slots), keys, values)
    assert made.reserve(STEP + 1)
    assert made.slots == 2 * STEP
    for buffer, written in ((made.keys_NBGLd, keys), (made.values_NBGLd, values)):
        assert torch.equal(buffer[1, 0, :, :2], written[:2].transpose(0, 1))
        assert torch.equal(buffer[1, 1, :, 0], written[2])
        assert buffer.count_nonzero() == written.count_nonzero()
    assert made.bytes_for(made.slots) == 2 * made.keys_NBGLd.numel() * 4


def test_rows_of_one_length_need_no_places() -> None:
    keys, values = torch.randn(2, 6, 2, 4)
    even, placed = cache(), cache()
    for made, places in ((even, None), (placed, (torch.arange(6) // 3, torch.arange(6) % 3))):
        made.reserve(3)
        made.write(2, places, keys, values)
    assert torch.equal(even.keys_NBGLd, placed.keys_NBGLd)
    assert torch.equal(even.values_NBGLd, placed.values_NBGLd)
