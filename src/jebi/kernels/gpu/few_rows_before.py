"""What a product of few rows needs of its input first: the norm and ``x A^T`` of all adapters, in one launch.

Shapes: M rows, K columns, R ranks. A program has one row and a few ranks; each takes the row's norm anew, which costs
less than a launch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.dependent import await_inputs, let_next_begin, overlaps
from jebi.kernels.gpu.launch import launch

_RANKS = 1
"""Ranks of one program: as few as there are, since nothing here is bound by memory."""


@dataclass(frozen=True)
class Laid:
    """Rows in the order in which a product's threads read them, so that what they read at once lies side by side.

    Read as they came, each request of 16 rows touched 16 cache lines for 512 bytes (57 us for 49, gate and up).
    """

    values: Tensor
    """(K / 32, four rows or a power of two more, 32), K rounded up to 128: where a value lies is `place_of`'s."""
    tokens: int
    """Rows that there are; what lies in others, and beyond K, is anything."""


def normed_and_compressed(
    x_MK: Tensor, norm: tuple[Tensor, float, bool] | None, down_RK: Tensor | None
) -> tuple[Laid, Tensor | None]:
    """The normed rows, or the given ones where there is no norm, and ``normed A^T`` (M, R) in their dtype."""
    tokens, width = x_MK.shape
    ranks = 0 if down_RK is None else down_RK.shape[0]
    down_RK = x_MK if down_RK is None else down_RK
    weight, eps, unit_offset = norm if norm is not None else (x_MK, 0.0, False)
    rows = max(4, triton.next_power_of_2(tokens))  # One kernel for one to four rows.
    y = torch.empty(triton.cdiv(width, 128) * 4, rows, 32, dtype=x_MK.dtype, device=x_MK.device)
    xa_MR = torch.empty(tokens, ranks, dtype=x_MK.dtype, device=x_MK.device)
    block = triton.next_power_of_2(width)
    launch(
        _before, (max(1, triton.cdiv(ranks, _RANKS)), tokens),
        x_MK, weight, down_RK, y, xa_MR, x_MK.stride(0), down_RK.stride(0), width, ranks, eps,
        NORM=norm is not None, ADAPTED=ranks > 0, UNIT_OFFSET=unit_offset, RANKS=_RANKS, ROWS=rows, BLOCK=block,
        OVERLAP=overlaps(x_MK), launch_pdl=overlaps(x_MK), num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return Laid(y, tokens), xa_MR if ranks else None


@triton.jit
def place_of(column, token, ROWS):
    """Where a value lies among those of ROWS rows: of 128 columns the 4 x 4 pieces of 8 are transposed, then rows."""
    return ((column // 128 * 4 + column // 8 % 4) * ROWS + token) * 32 + column // 32 % 4 * 8 + column % 8


@triton.jit
def _before(
    x_ptr, weight_ptr, down_ptr, y_ptr, xa_ptr, x_stride, down_stride, width, ranks, eps,
    NORM: tl.constexpr, ADAPTED: tl.constexpr, UNIT_OFFSET: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_begin()
    dtype = y_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if ADAPTED:
        down = tl.load(
            down_ptr + rank[:, None] * down_stride + column[None], (rank < ranks)[:, None] & inside[None], other=0.0
        )
    if OVERLAP:
        await_inputs()
    x = tl.load(x_ptr + token * x_stride + column, inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        # Rounded where `gpu.rms_norm` rounds.
        x = x * (1.0 + weight) if UNIT_OFFSET else x.to(dtype).to(tl.float32) * weight
        x = x.to(dtype).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(y_ptr + place_of(column, token, ROWS), x.to(dtype), inside)
    if ADAPTED:
        xa = tl.sum(down.to(tl.float32) * x[None], 1)
        tl.store(xa_ptr + token * ranks + rank, xa.to(dtype), rank < ranks)
