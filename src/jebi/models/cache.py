"""A key/value cache that grows in steps: appending a token writes one row instead of copying all that came before.

transformers' own dynamic cache concatenates at every token. On a CPU that copy, into newly mapped memory, was the
largest part of a decoding step: 20 rows of 200 tokens, 163 ms a token with it, 65 without.

Shapes: B batch, G key/value heads, L tokens so far, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

STEP = 256
"""Tokens by which the buffers grow."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values: ``keys`` and ``values`` are views of the filled part of two larger buffers.

    What transformers does to a dynamic layer (crop, reorder, select, repeat) works on the views; where it leaves
    tensors that are no longer views of the buffers, the next update moves them into new ones.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, G, S, d) keys and values; return all of them, (B, G, L + S, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: list[Tensor | None] = [None, None]
        keys = self.keys = self._append(0, self.keys, key_states)
        values = self.values = self._append(1, self.values, value_states)
        return keys, values

    def _append(self, which: int, filled: Tensor | None, new: Tensor) -> Tensor:
        assert filled is not None
        past = filled.shape[-2] if filled.numel() else 0
        length = past + new.shape[-2]
        buffer = self._buffers[which]
        if buffer is None or filled.data_ptr() != buffer.data_ptr() or length > buffer.shape[-2]:
            room = -(-length // STEP) * STEP
            buffer = torch.empty(*new.shape[:-2], room, new.shape[-1], dtype=new.dtype, device=new.device)
            if past:
                buffer[..., :past, :] = filled
            self._buffers[which] = buffer
        buffer[..., past:length, :] = new
        return buffer[..., :length, :]


class GrowingCache(Cache):
    """A cache of growing layers, as many as the model has."""

    def __init__(self, of_generate: bool = False):
        """Empty; ``of_generate`` where ``generate`` made it for itself, so that nobody looks at it afterwards."""
        super().__init__(layer_class_to_replicate=GrowingLayer)
        self.of_generate = of_generate
