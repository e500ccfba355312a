"""Rows laid end to end: the shape every training pass has, without padding.

Shapes: T tokens of all rows together.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each row of a flat batch begins and which position each token has in its row."""

    starts: tuple[int, ...]
    """Index of each row's first token, then T: one more entry than there are rows. Kept on the host."""
    positions_T: Tensor
    """Position of each token in its own row, on the tokens' device."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((end - start for start, end in pairwise(self.starts)), default=0)

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of every row."""
        return list(pairwise(self.starts))

    def to(self, device: torch.device) -> "Rows":
        """The same rows with their positions on another device."""
        return Rows(self.starts, self.positions_T.to(device, non_blocking=True))

    def cu_seqlens(self) -> Tensor:
        """The starts as the int32 tensor that variable-length attention takes."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.positions_T.device)


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
