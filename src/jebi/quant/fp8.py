"""Rows in 8-bit floats: numbers of e4m3, one byte each, times a scale a row, for products on tensor cores.

The largest magnitude of a row becomes 448, the largest number that e4m3 has ("FP8 formats for deep learning",
arXiv:2209.05433: 4 bits of exponent, 3 of mantissa), so that nothing overflows; a value is off by a 16th of itself at
most, or by 2**-10 of the scale where it is below 2**-6 of it. Reading checkpoints that others wrote in fp8 is
`quant.scaled`'s business; the products are `kernels.scaled_product`'s.

Shapes: T rows, K columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0
"""Of e4m3 without infinities."""
SMALLEST = 1e-30
"""Rows whose largest magnitude is not above this are taken for zeros: the inverse of their scale would overflow."""


@dataclass(frozen=True)
class Fp8Rows:
    """A matrix, ``numbers * scale``."""

    numbers_TK: Tensor
    """float8_e4m3fn, contiguous."""
    scale_T1: Tensor
    """float32, contiguous."""

    def dense(self) -> Tensor:
        """The matrix (T, K) in float32."""
        return self.numbers_TK.float() * self.scale_T1


def scale_of(largest: Tensor) -> Tensor:
    """The scale, float32, of rows with these largest magnitudes; 1 for rows of zeros."""
    largest = largest.float()
    # By the reciprocal, which torch divides by on a card and not on a CPU.
    return torch.where(largest > SMALLEST, largest * (1 / LARGEST), torch.ones_like(largest))


def quantize_rows(x_TK: Tensor) -> Fp8Rows:
    """Reference: the nearest e4m3 numbers to the rows of ``x``, of any float dtype; NaN stays NaN."""
    scale_T1 = scale_of(x_TK.abs().amax(dim=1, keepdim=True))
    return Fp8Rows(numbers_of(x_TK, scale_T1), scale_T1)


def numbers_of(x_TK: Tensor, scale: Tensor) -> Tensor:
    """``x / scale``, rounded to e4m3 (T, K); what lies beyond its largest becomes that.

    Args:
        x_TK: any float dtype.
        scale: float32, a row (T, 1) or a column (1, K) each.
    """
    scaled_TK = x_TK.float() * scale.reciprocal()
    return scaled_TK.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
