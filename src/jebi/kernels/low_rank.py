"""A product of two thin matrices that is still to be added to something: an adapter's share of an output or a gradient.

Added where that something is read anyway, it costs no pass over memory of its own; `added` does it at once.

Shapes: T tokens, R ranks, F columns.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``left @ right``."""

    left_TR: Tensor
    """Contiguous within a row."""
    right_RF: Tensor
    """Strided as it likes."""


def added(x_TF: Tensor, thin: LowRank | None) -> Tensor:
    """``x + left @ right`` in a new tensor; ``x`` itself where nothing is to be added."""
    return x_TF if thin is None else x_TF.addmm(thin.left_TR, thin.right_RF)
