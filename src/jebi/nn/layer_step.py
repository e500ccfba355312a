"""One new token a row through a decoder layer, its keys and values in a static cache: what decoding repeats.

Everything a step depends on lies in tensors on the device, so that a run of steps can be captured as a CUDA graph and
replayed. `plain_step` is the reference, in torch's products over `layer_steps`; the form of few launches is
`few_rows_step`'s. Whole prompts go through `layer_node.run_without_graph`.

Shapes: B rows, D width, H query heads, G key/value heads, d head size, L slots of the cache that are looked at.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from jebi.nn.attention import attend_cached
from jebi.nn.layer import DecoderLayer
from jebi.nn.layer_steps import behind_attention, feed_forward, turn
from jebi.nn.rotary import Tables


@dataclass
class Now:
    """Where the new tokens of a step stand. A row's tokens lie in the slots 0, 1, 2, ... of the cache, unpadded."""

    lengths_B: Tensor
    """Tokens that each row had before, int64: the new one's slot, and its position."""
    reach: int
    """L: no row has more tokens than that, the new one counted."""
    even: bool = False
    """Whether every row is known to have ``reach`` tokens, so that nothing is to be hidden."""

    def __post_init__(self) -> None:
        self._masks: dict[int | None, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    @cached_property
    def rows_B(self) -> Tensor:
        """0, 1, 2, ..., made once a step."""
        return torch.arange(len(self.lengths_B), device=self.lengths_B.device)

    @cached_property
    def ends_B(self) -> Tensor:
        """Behind each row's new token, int32, made once a step."""
        return (self.lengths_B + 1).int()

    def counts(self, groups: int) -> Tensor:
        """`kernels.cached_attention`'s for so many heads of keys a row, made once a step."""
        if groups not in self._counts:
            self._counts[groups] = self.lengths_B.new_zeros(len(self.lengths_B) * groups, dtype=torch.int32)
        return self._counts[groups]

    def mask(self, window: int | None) -> Tensor | None:
        """(B, 1, L) booleans, true where a new token may look; None where it may look everywhere.

        Made once a step for the layers of one window.
        """
        if window is not None and window >= self.reach:
            window = None
        if self.even and window is None:
            return None
        if window not in self._masks:
            back_BL = self.lengths_B[:, None] - torch.arange(self.reach, device=self.lengths_B.device)
            seen_BL = back_BL >= 0 if window is None else (back_BL >= 0) & (back_BL < window)
            self._masks[window] = seen_BL[:, None]
        return self._masks[window]


class LayerStep(Protocol):
    """A layer's way of taking one token a row."""

    def __call__(
        self, layer: DecoderLayer, hidden_BD: Tensor, tables: Tables, keys_BGLd: Tensor, values_BGLd: Tensor, now: Now
    ) -> Tensor:
        """The layer's output (B, D).

        Args:
            layer: the layer.
            hidden_BD: the residual stream.
            tables: cosines and sines of the tokens' positions, each (B, at most d).
            keys_BGLd: the layer's part of the cache, of ``now.reach`` slots or more; the new keys are written into it.
            values_BGLd: likewise.
            now: where the tokens stand.
        """
        ...


def plain_step(
    layer: DecoderLayer, hidden_BD: Tensor, tables: Tables, keys_BGLd: Tensor, values_BGLd: Tensor, now: Now
) -> Tensor:
    """See `LayerStep`; for any device."""
    groups = layer.answering
    q_BHd, k_BGd, v_BGd = turn(layer, hidden_BD, tables, groups).qkv
    keys_BGLd[now.rows_B, :, now.lengths_B] = k_BGd
    values_BGLd[now.rows_B, :, now.lengths_B] = v_BGd
    form = layer.shape.attention
    keys_BGLd, values_BGLd = keys_BGLd[:, :, : now.reach], values_BGLd[:, :, : now.reach]
    mixed_BSHd = attend_cached(q_BHd[:, None], keys_BGLd, values_BGLd, now.mask(form.window), form)
    return feed_forward(layer, behind_attention(layer, hidden_BD, mixed_BSHd.flatten(1), groups=groups), groups)
