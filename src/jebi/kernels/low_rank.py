"""A product of two thin matrices that is still to be added to something: an adapter's share of an output or a gradient.

Added where that something is read anyway, it costs no pass over memory of its own; `added` does it at once.

Shapes: T tokens, R ranks, F columns.
"""

from dataclasses import dataclass

import torch
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


def summed(thin: LowRank | None, x_TF: Tensor) -> Tensor | None:
    """``left^T x`` (R, F), float32: the gradient of ``right`` where ``x`` is that of the sum."""
    return None if thin is None else product32(thin.left_TR.t(), x_TF)


def product32(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` in float32, from whichever dtype.

    On a card no sum is rounded to the factors' dtype. On a CPU, whose products know no other result, those of bfloat16
    are; those of float16 are not, since a sum over many tokens may be beyond 65,504.
    """
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return (a @ b).float()
