"""Rotary position embedding, in place or into another tensor: one program a token and a few heads.

Shapes: T tokens, H heads, d head size, R <= d rotated size. Heads may be strided; values within a head are contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 4


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_THd: Tensor, backwards: bool) -> None:
    """Write every head, turned by its token's angles, into ``out_THd``, which may be ``x_THd`` itself.

    ``backwards`` turns the other way, which is the gradient. The part of a head beyond R is copied.
    """
    tokens, heads, size = x_THd.shape
    rotated = cos_TR.shape[-1]
    _rotate[(tokens, triton.cdiv(heads, _HEADS))](
        x_THd, cos_TR, sin_TR, out_THd, *x_THd.stride()[:2], *out_THd.stride()[:2],
        heads, rotated // 2, size - rotated, -1.0 if backwards else 1.0,
        HEADS=_HEADS, HALF=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(size - rotated) if size > rotated and out_THd.data_ptr() != x_THd.data_ptr() else 0,
        num_warps=2,
    )  # fmt: skip


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, out_token, out_head, heads, half, rest, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None]
    inside = (head < heads) & (column < half)
    # The table repeats its half, so one half of it is read.
    cos = tl.load(cos_ptr + token * 2 * half + column, column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * half + column, column < half, other=0.0).to(tl.float32) * sign
    source = x_ptr + token * x_token + head * x_head + column
    a = tl.load(source, inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, inside, other=0.0).to(tl.float32)
    target = out_ptr + token * out_token + head * out_head + column
    tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), inside)
    tl.store(target + half, (b * cos + a * sin).to(out_ptr.dtype.element_ty), inside)
    if REST > 0:
        column = tl.arange(0, REST)[None]
        inside = (head < heads) & (column < rest)
        kept = tl.load(x_ptr + token * x_token + head * x_head + 2 * half + column, inside)
        tl.store(out_ptr + token * out_token + head * out_head + 2 * half + column, kept, inside)
