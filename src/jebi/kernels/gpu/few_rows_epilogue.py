"""What becomes of a product of few rows before it is stored: bias, an adapter's share, the gated activation, residual.

Shapes: M rows of ``x``, N rows of W, R ranks. A program has ROWS rows of W and takes RANK ranks at a time.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the product before it is stored; in this order, and in float32."""

    bias_N: Tensor | None = None
    left_MR: Tensor | None = None
    """``left right^T`` is added: an adapter's share."""
    right_NR: Tensor | None = None
    activation: int | None = None
    """W is gate above up: what is stored is ``act(gate) * up * scale``. 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    scale: float = 1.0
    residual_MN: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of the adapter; 0 where there is none."""
        return 0 if self.left_MR is None else self.left_MR.shape[1]


def epilogue_arguments(after: Epilogue, absent: Tensor, out_MN: Tensor) -> tuple[object, ...]:
    """An epilogue's tensors, strides and sizes in a kernel's order."""
    bias, left, right, residual = (
        absent if part is None else part for part in (after.bias_N, after.left_MR, after.right_NR, after.residual_MN)
    )
    strides = left.stride(0), right.stride(0), residual.stride(0), out_MN.stride(0)
    return bias, left, right, residual, out_MN, *strides, after.rank, after.scale


def epilogue_constants(after: Epilogue) -> dict[str, int | bool]:
    """An epilogue's compile-time constants."""
    at_once = min(64, max(16, triton.next_power_of_2(after.rank))) if after.rank else 0
    return {
        "BIAS": after.bias_N is not None,
        "RANK": at_once,
        "EIGHT": after.rank > 0 and all(size % 8 == 0 for size in (after.rank, *_strides(after))),
        "ACTIVATION": -1 if after.activation is None else after.activation,
        "RESIDUAL": after.residual_MN is not None,
    }


def _strides(after: Epilogue) -> tuple[int, ...]:
    """Of the adapter's matrices."""
    return tuple(part.stride(0) for part in (after.left_MR, after.right_NR) if part is not None)


@triton.jit
def adapter(
    left_ptr, right_ptr, left_stride, right_stride, token, tokens, found, start, rank, RANK: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """An adapter's values from rank ``start`` on: of W's rows (ROWS, RANK), and of ``x`` (RANK, M).

    EIGHT says that ranks and strides are multiples of eight: 16 bytes are then read at a time.
    """
    if EIGHT:
        # Which Triton sees so; what it is told of a number that is no constant is that it divides by 16, or nothing.
        left_stride, right_stride = left_stride // 8 * 8, right_stride // 8 * 8
    index = start + tl.arange(0, RANK)
    right_at = right_ptr + found.to(tl.int64)[:, None] * right_stride + index[None]
    left_at, there = left_ptr + token[None] * left_stride + index[:, None], (token < tokens)[None]
    inside = tl.max_constancy(index < rank, 8) if EIGHT else index < rank
    right = tl.load(right_at, inside[None], other=0.0)
    left = tl.load(left_at, there & inside[:, None], other=0.0)
    return right, left


@triton.jit
def share(
    right, left, left_ptr, right_ptr, left_stride, right_stride, token, tokens, found, rank, RANK: tl.constexpr,
    EIGHT: tl.constexpr, M: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """An adapter's share (ROWS, M), of the ranks that were read and of those behind them."""
    if ASSEMBLY:
        right, left = late(right), late(left)
    y = thin(right, left, M)
    for start in tl.range(RANK, rank, RANK, num_stages=1):
        right, left = adapter(
            left_ptr, right_ptr, left_stride, right_stride, token, tokens, found, start, rank, RANK, EIGHT
        )
        y += thin(right, left, M)
    return y


@triton.jit
def late(values):
    """Values as they are, not looked at before this: Triton would lay them in shared memory where they are read."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], dtype=values.dtype, is_pure=False, pack=2)


@triton.jit
def thin(right, left, M: tl.constexpr):
    """The product (ROWS, M) of what `adapter` has read."""
    if left.shape[1] >= 8:
        y = tl.dot(right, left, input_precision="ieee")
        y = tl.sum(tl.reshape(y, (y.shape[0], left.shape[1] // M, M)), 1)  # Columns beyond M are zeros.
    else:
        y = tl.sum(right.to(tl.float32)[:, :, None] * left.to(tl.float32)[None], 1)
    return y


@triton.jit
def activated(y, scale, dtype, M: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr):
    """``act(gate) * up * scale`` (ROWS / 2, M), of gate above up (ROWS, M)."""
    gate, up = tl.split(tl.permute(tl.reshape(y, (2, ROWS // 2, M)), (1, 2, 0)))
    # Each rounded where a plain layer rounds: the products, then the activation.
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    if ACTIVATION == 0:
        act = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == 1:
        act = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        act = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    return act.to(dtype).to(tl.float32) * scale * up
