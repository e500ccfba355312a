"""Rows laid end to end: the shape every training pass has, without padding, beginnings in common held once.

Rows that begin alike (a template's first lines, a system prompt) have the same hidden states there, since a token sees
only what stands before it. Such tokens go through the projections once; attention alone sees every row whole.

Shapes: U tokens held, T tokens of all rows laid out whole; U = T where nothing is shared.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each row of a flat batch begins, and which held tokens it is made of."""

    starts: tuple[int, ...]
    """Index of each row's first token when all are laid out whole, then T: one more entry than rows. On the host."""
    positions_U: Tensor
    """Position of each held token in its row, on the tokens' device."""
    whole_T: Tensor | None = None
    """For each token of the whole rows, the held token that it is; None where nothing is shared."""
    first_U: Tensor | None = None
    """For each held token, where it first stands in the whole rows; None where nothing is shared."""

    cu: Tensor | None = None
    """The starts as the int32 tensor that variable-length attention takes, where it is given: then it alone decides
    where rows begin, and ``starts`` only say how many there are at most and how long they may be."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((end - start for start, end in pairwise(self.starts)), default=0)

    @property
    def alike(self) -> bool:
        """Whether all rows are known to be of one length."""
        return self.cu is None and len({end - start for start, end in pairwise(self.starts)}) == 1

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of every row; where `cu` decides, it is read, for which the host waits."""
        return list(pairwise(self.starts if self.cu is None else self.cu.tolist()))

    def to(self, device: torch.device) -> "Rows":
        """The same rows with their tensors on another device."""
        tensors = (self.whole_T, self.first_U, self.cu)
        moved = (None if x is None else x.to(device, non_blocking=True) for x in tensors)
        return Rows(self.starts, self.positions_U.to(device, non_blocking=True), *moved)

    def spread(self, x_UHd: Tensor) -> Tensor:
        """Held tokens to whole rows, (U, ...) -> (T, ...)."""
        return x_UHd if self.whole_T is None else x_UHd.index_select(0, self.whole_T)

    def gather(self, x_THd: Tensor) -> Tensor:
        """Whole rows to held tokens, (T, ...) -> (U, ...): each from where it first stands."""
        return x_THd if self.first_U is None else x_THd.index_select(0, self.first_U)

    def spread_backward(self, dx_THd: Tensor, held: int) -> Tensor:
        """Gradient of `spread`'s input, of that many held tokens."""
        return dx_THd if self.whole_T is None else _summed(dx_THd, self.whole_T, held)

    def gather_backward(self, dx_UHd: Tensor, whole: int) -> Tensor:
        """Gradient of `gather`'s input, of that many tokens."""
        return dx_UHd if self.first_U is None else _summed(dx_UHd, self.first_U, whole)

    def cu_seqlens(self) -> Tensor:
        """The starts as the int32 tensor that variable-length attention takes."""
        return self._given_or_made_cu

    @cached_property
    def _given_or_made_cu(self) -> Tensor:
        # Made once for all layers: the host waits for its copy to a card.
        if self.cu is not None:
            return self.cu
        return torch.tensor(self.starts, dtype=torch.int32, device=self.positions_U.device)


def rows_from_lengths(lengths: list[int], device: torch.device) -> Rows:
    """Rows of the given lengths, each with positions 0, 1, 2, ..."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = [torch.arange(length, device=device) for length in lengths]
    return Rows(tuple(starts), torch.cat(positions) if positions else torch.empty(0, dtype=torch.long, device=device))


def rows_from_positions(positions_T: Tensor) -> Rows:
    """Rows recovered from flat positions: a row begins wherever the position does not grow by one."""
    step_T = positions_T.diff(prepend=positions_T[:1])
    begins = (step_T != 1).nonzero().flatten().tolist()
    if not begins or begins[0] != 0:
        begins.insert(0, 0)
    return Rows((*begins, positions_T.shape[0]), positions_T)


def _summed(dx: Tensor, index: Tensor, size: int) -> Tensor:
    """Gradient of an ``index_select`` of ``size`` entries along the first dimension."""
    return dx.new_zeros(size, *dx.shape[1:]).index_add_(0, index, dx)
