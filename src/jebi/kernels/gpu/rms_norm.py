"""Root-mean-square norm: one program a token, the token's row in registers.

Shapes: T tokens, D width. Rows may be strided; values within a row are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch


def forward(x_TD: Tensor, weight_D: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """The normed tokens (T, D), contiguous, and ``1 / rms`` (T, 1) in float32."""
    rows, width = x_TD.shape
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rstd_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TD.device)
    block, warps = _block(width)
    launch(
        _forward, (rows,),
        x_TD, weight_D, y_TD, rstd_T1, x_TD.stride(0), width, eps,
        UNIT_OFFSET=unit_offset, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y_TD, rstd_T1


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T1: Tensor,
    weight_D: Tensor,
    unit_offset: bool,
    residual_TD: Tensor | None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """Gradient of the input, (T, D) contiguous; ``residual_TD`` is added to it before it is rounded.

    It is written into ``out_TD`` where given, which may be ``residual_TD``: a token's residual is read before its
    gradient is written.
    """
    rows, width = x_TD.shape
    dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out_TD is None else out_TD
    added_TD = dx_TD if residual_TD is None else residual_TD
    block, warps = _block(width)
    launch(
        _backward, (rows,),
        dy_TD, x_TD, rstd_T1, weight_D, added_TD, dx_TD,
        dy_TD.stride(0), x_TD.stride(0), added_TD.stride(0), width,
        UNIT_OFFSET=unit_offset, ADD=residual_TD is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return dx_TD


def _block(width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 512))


@triton.jit
def _forward(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, x_stride, width, eps,
    UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, inside, other=0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    if UNIT_OFFSET:
        y = x * rstd * (1.0 + weight.to(tl.float32))
    else:
        # Rounded before the weight, as transformers rounds.
        y = (x * rstd).to(y_ptr.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    dy_ptr, x_ptr, rstd_ptr, weight_ptr, added_ptr, dx_ptr, dy_stride, x_stride, added_stride, width,
    UNIT_OFFSET: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    rstd = tl.load(rstd_ptr + row)
    normed = tl.load(x_ptr + row * x_stride + columns, inside, other=0.0).to(tl.float32) * rstd
    weight = tl.load(weight_ptr + columns, inside, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    g = tl.load(dy_ptr + row * dy_stride + columns, inside, other=0.0).to(tl.float32) * weight
    mean = tl.sum(tl.where(inside, g * normed, 0.0), 0) / width
    dx = (g - normed * mean) * rstd
    if ADD:
        dx += tl.load(added_ptr + row * added_stride + columns, inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), inside)
