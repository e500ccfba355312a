"""Keys and values of the rows that are being answered, in two tensors that stay where they are while tokens are added.

A row's tokens lie in the slots 0, 1, 2, ... whatever the other rows' lengths; how many are filled is the engine's to
know. transformers' cache objects are `models.cache`'s.

Shapes: N layers, B rows, G key/value heads, L slots, d head size; T tokens of all rows.
"""

import torch
from torch import Tensor

from jebi.models.families import DecoderShape

STEP = 256
"""Fewest slots."""


def slots_for(tokens: int) -> int:
    """The step of sizes, 256 times a power of two, that holds so many tokens a row."""
    slots = STEP
    while slots < tokens:
        slots *= 2
    return slots


class StaticCache:
    """Buffers of some number of rows, which grow in steps."""

    def __init__(self, shape: DecoderShape, batch: int, dtype: torch.dtype, device: torch.device):
        """Empty, of no slots yet."""
        layer = shape.layer
        size = len(shape.layers), batch, layer.kv_heads, 0, layer.head_dim
        self.keys_NBGLd = torch.empty(size, dtype=dtype, device=device)
        self.values_NBGLd = torch.empty_like(self.keys_NBGLd)

    @property
    def slots(self) -> int:
        """L."""
        return self.keys_NBGLd.shape[3]

    @property
    def nbytes(self) -> int:
        """Size of both buffers now."""
        return self.bytes_for(self.slots)

    def bytes_for(self, slots: int) -> int:
        """Size of both buffers at so many slots."""
        layers, batch, groups, _, size = self.keys_NBGLd.shape
        return 2 * layers * batch * groups * slots * size * self.keys_NBGLd.itemsize

    def reserve(self, tokens: int) -> bool:
        """Make room for so many tokens a row; whether the buffers had to move for it."""
        if tokens <= self.slots:
            return False
        self.keys_NBGLd, self.values_NBGLd = (self._grown(x, slots_for(tokens)) for x in self._both())
        return True

    def clear(self) -> None:
        """Leave nothing of an answer behind: a NaN in it, hidden or not, would be in all that come after."""
        for buffer_NBGLd in self._both():
            buffer_NBGLd.zero_()

    def write(self, layer: int, places: tuple[Tensor, Tensor] | None, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put a layer's keys and values of many tokens where these belong.

        ``places`` are each token's row and slot; None where all rows begin with equally many, laid end to end.
        """
        for buffer_NBGLd, new_TGd in zip(self._both(), (k_TGd, v_TGd)):
            buffer_BGLd = buffer_NBGLd[layer]
            if places is not None:
                buffer_BGLd[places[0], :, places[1]] = new_TGd
            else:
                new_BSGd = new_TGd.unflatten(0, (buffer_BGLd.shape[0], -1))
                buffer_BGLd[:, :, : new_BSGd.shape[1]] = new_BSGd.transpose(1, 2)

    def _both(self) -> tuple[Tensor, Tensor]:
        return self.keys_NBGLd, self.values_NBGLd

    @staticmethod
    def _grown(old_NBGLd: Tensor, slots: int) -> Tensor:
        # Zeros, since slots that are hidden still meet a probability of zero, which NaN would survive.
        new_NBGLd = old_NBGLd.new_zeros(*old_NBGLd.shape[:3], slots, old_NBGLd.shape[4])
        new_NBGLd[:, :, :, : old_NBGLd.shape[3]] = old_NBGLd
        return new_NBGLd
