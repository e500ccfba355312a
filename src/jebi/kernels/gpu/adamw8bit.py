"""One AdamW step with 8-bit moments over a flat stretch: one program a block of 256, everything in registers.

Shapes: T values of a stretch, B its blocks; the number format is `quant.dynamic8`'s.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch

_BLOCK = 256


def step_(
    param_T: Tensor, grad_T: Tensor, moments: tuple[Tensor, Tensor, Tensor, Tensor], rates: Any, tables: Any
) -> None:
    """Update ``param_T`` and the moments in place.

    Args:
        param_T: float32, bfloat16 or float16, contiguous.
        grad_T: likewise.
        moments: ``state1``, ``state2`` uint8 (T), ``absmax1``, ``absmax2`` float32 (B).
        rates: `kernels.adamw8bit.Rates`.
        tables: for the signed and the unsigned format, the 256 codes and the 65,536 grid points' nearest codes.
    """
    (codes1, nearest1), (codes2, nearest2) = tables
    correction1 = 1.0 - rates.beta1**rates.step
    correction2 = math.sqrt(1.0 - rates.beta2**rates.step)
    decay = 1.0 - rates.lr * rates.weight_decay if rates.weight_decay > 0 else 1.0
    launch(
        _step, (triton.cdiv(param_T.numel(), _BLOCK),),
        param_T, grad_T, *moments, codes1, nearest1, codes2, nearest2, param_T.numel(),
        rates.beta1, rates.beta2, rates.eps, decay, rates.lr / correction1, correction2,
        BLOCK=_BLOCK, num_warps=2,
    )  # fmt: skip


@triton.jit
def _nearest(values, absmax, nearest_ptr, inside):
    """The code nearest to each value, by `quant.dynamic8.quantize`'s rule."""
    # A block of zeros has code 0, as has a NaN.
    scaled = tl.where(absmax > 0, values * (1.0 / absmax), -1.0)
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -1.0), 1.0), -1.0)
    grid = ((scaled + 1.0) * 32767.5 + 0.5).to(tl.int32)
    return tl.load(nearest_ptr + grid, inside, other=0)


@triton.jit
def _step(
    param_ptr, grad_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr,
    codes1_ptr, nearest1_ptr, codes2_ptr, nearest2_ptr, values,
    beta1, beta2, eps, decay, rate, correction2, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < values
    grad = tl.load(grad_ptr + index, inside, other=0.0).to(tl.float32)
    code1 = tl.load(state1_ptr + index, inside, other=0).to(tl.int32)
    code2 = tl.load(state2_ptr + index, inside, other=0).to(tl.int32)
    first = tl.load(codes1_ptr + code1) * tl.load(absmax1_ptr + block)
    second = tl.load(codes2_ptr + code2) * tl.load(absmax2_ptr + block)
    first = first * beta1 + grad * (1.0 - beta1)
    second = second * beta2 + grad * grad * (1.0 - beta2)
    param = tl.load(param_ptr + index, inside, other=0.0).to(tl.float32) * decay
    param -= rate * first / (tl.sqrt(second) / correction2 + eps)
    tl.store(param_ptr + index, param.to(param_ptr.dtype.element_ty), inside)
    absmax1 = tl.max(tl.where(inside, tl.abs(first), 0.0), 0)
    absmax2 = tl.max(tl.where(inside, second, 0.0), 0)
    tl.store(absmax1_ptr + block, absmax1)
    tl.store(absmax2_ptr + block, absmax2)
    tl.store(state1_ptr + index, _nearest(first, absmax1, nearest1_ptr, inside), inside)
    tl.store(state2_ptr + index, _nearest(second, absmax2, nearest2_ptr, inside), inside)
