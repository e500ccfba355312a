"""DoRA: a row of the adapted weight is its trained length times its direction (arXiv:2402.09353).

``y = gain * (x W^T + scale x A^T B^T) + b`` with ``gain = m / ||W + scale B A||``, row by row. The lengths follow A and
B but count as constants in the gradient (section 4.3 there), as in PEFT.

Shapes: N outputs, K inputs, R rank.
"""

import torch
from torch import Tensor, nn

from jebi.nn.lora import Lora

_LEAST = 1e-30
"""Stands for the squared length of a row of zeros, whose gain is then 0 instead of 0 / 0."""


@torch.no_grad()
def row_lengths(lora: Lora, weight_NK: Tensor) -> Tensor:
    """``||W + scale B A||`` of each row, float32 (N,), without a matrix of the weight's size.

    ``||W_n||^2 + 2 (W A^T)_n B_n + B_n (A A^T) B_n`` with the scale within B; the first term is computed once.
    """
    if lora.base_squares_N is None:
        lora.base_squares_N = torch.linalg.vector_norm(weight_NK, dim=1, dtype=torch.float32).square_()
    A_RK, B_NR = lora.down(torch.float32), lora.up(torch.float32)
    mixed_NR = (weight_NK @ A_RK.to(weight_NK.dtype).t()).float().mul_(2).addmm_(B_NR, A_RK @ A_RK.t())
    return (lora.base_squares_N + mixed_NR.mul_(B_NR).sum(1)).clamp_(_LEAST).sqrt_()


def start(lora: Lora, weight_NK: Tensor) -> None:
    """Give an adapter trained lengths that are those of the adapted weight, so that the map is unchanged."""
    lora.magnitude_N = nn.Parameter(row_lengths(lora, weight_NK))


def gain(lora: Lora, weight_NK: Tensor) -> Tensor:
    """What each output is multiplied by, float32 (N,); differentiable by the trained lengths alone."""
    assert lora.magnitude_N is not None
    return lora.magnitude_N / row_lengths(lora, weight_NK)
