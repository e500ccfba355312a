"""Rotary positions of one kind of layer: from where tokens stand to the cosines and sines that turn their heads.

Which frequencies a model has is read from its config by `models.rope`; the rotation itself is `kernels.rope`.

Shapes: U held tokens, B batch, S new tokens, P positions, R rotated size of a head, which may be smaller than the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from jebi.kernels.rope import rope_tables
from jebi.nn.rows import Rows

Tables = tuple[Tensor, Tensor]
"""Cosine and sine, each (..., R)."""

_FEWEST = 256
"""Positions of the smallest tables that are looked up in."""


@dataclass
class Rotary:
    """Inverse frequencies, and how they change with a row's length.

    A row's frequencies depend on that row alone, so each gets what transformers gives it in a batch of one.
    transformers itself chooses by the largest position in the batch, with which results would depend on what else
    stands in the batch.
    """

    inv_freq: Tensor
    """(R / 2,) float32."""
    scaling: float = 1.0
    """Factor on both tables, YaRN's and longrope's attention factor."""
    reach: int | None = None
    """Tokens of the longest row for which ``inv_freq`` holds; None where it holds for all."""
    beyond: Callable[[int], Tensor] | None = None
    """Inverse frequencies (R / 2,) of a longer row by its number of tokens; given where ``reach`` is."""

    restarts: bool = False
    """Whether a row that grows beyond ``reach`` while it is decoded has to begin again: keys that were turned by the
    other frequencies are of no use to it (longrope)."""
    _known: dict[tuple[int, torch.dtype, torch.device], Tables] = field(init=False, repr=False, compare=False)
    """Tables of the positions below some power of two. Captured graphs read them, so none is let go before these."""

    def __post_init__(self) -> None:
        assert (self.reach is None) == (self.beyond is None), "a reach needs what comes beyond it"
        self._known = {}

    def __getstate__(self) -> dict[str, object]:
        """Without the tables that steps look up: a copy makes its own."""
        return vars(self) | {"_known": {}}

    def forget(self) -> None:
        """Let go of the tables of steps, over which no graph is captured any more."""
        self._known.clear()

    def holds(self, longest: int) -> bool:
        """Whether rows of up to ``longest`` tokens all turn by the same frequencies."""
        return self.reach is None or longest <= self.reach

    def outgrown(self, past: int, length: int) -> bool:
        """Whether a row of ``past`` cached tokens has to begin again to become one of ``length``."""
        return self.restarts and self.reach is not None and 0 < past <= self.reach < length

    def of_rows(self, rows: Rows, dtype: torch.dtype) -> Tables:
        """Tables (U, R) of flat rows. A row is as long as it has tokens: its positions are 0, 1, 2, ...

        Rows must not share beginnings where one of them is longer than ``reach``: the same tokens then turn otherwise
        in it than in a shorter row.
        """
        device = rows.positions_U.device
        if self.holds(rows.longest):
            return rope_tables(rows.positions_U, self._inv_freq(0, device), self.scaling, dtype)
        assert rows.whole_T is None, "rows share beginnings that they turn differently; see Decoder.shares_beginnings"
        lengths = [end - start for start, end in rows.spans()]
        inv_freq = torch.cat([self._inv_freq(length, device).expand(length, -1) for length in lengths])
        return rope_tables(rows.positions_U, inv_freq, self.scaling, dtype)

    def of_positions(self, positions_BS: Tensor, dtype: torch.dtype) -> Tables:
        """Tables (B, S, R) of new tokens; each batch row is as long as its largest position says.

        Keys that were cached before keep the frequencies of the row as it was then, as in transformers.
        """
        device = positions_BS.device
        if self.reach is None:
            return rope_tables(positions_BS, self._inv_freq(0, device), self.scaling, dtype)
        lengths = (positions_BS.amax(dim=-1) + 1).tolist()
        inv_freq = torch.stack([self._inv_freq(length, device) for length in lengths])[:, None]
        return rope_tables(positions_BS, inv_freq, self.scaling, dtype)

    def of_step(self, positions_B: Tensor, reach: int, dtype: torch.dtype) -> Tables:
        """`of_positions` (B, R) of one new token a row, all of which stand below ``reach``.

        Looked up where frequencies hold for all lengths: two launches on a card, where computing them is eight.
        """
        if self.reach is not None:
            cos_B1R, sin_B1R = self.of_positions(positions_B[:, None], dtype)
            return cos_B1R[:, 0], sin_B1R[:, 0]
        key = max(_FEWEST, 1 << (reach - 1).bit_length()), dtype, positions_B.device
        if key not in self._known:
            with torch.inference_mode(False):  # they outlive the call
                self._known[key] = self.of_positions(torch.arange(key[0], device=key[2]), dtype)
        cos_PR, sin_PR = self._known[key]
        return cos_PR.index_select(0, positions_B), sin_PR.index_select(0, positions_B)

    def _inv_freq(self, length: int, device: torch.device) -> Tensor:
        if self.beyond is not None and not self.holds(length):
            return self.beyond(length).to(device)
        self.inv_freq = self.inv_freq.to(device)  # kept, so that only the first pass copies
        return self.inv_freq
