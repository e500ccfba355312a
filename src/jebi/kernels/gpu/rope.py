"""Rotary position embedding, in place or into another tensor, and what is still to be added to its input.

A program takes a few tokens and heads, whose cosines and sines it reads once. An adapter's share of queries, keys and
values is added here, where these are read anyway (8,192 tokens of a Llama 8B layer: 0.11 ms for a pass of its own).

Shapes: T tokens, H heads, d head size, R <= d rotated size, r ranks. Heads may be strided; values within a head are
contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch
from jebi.kernels.low_rank import LowRank

_TOKENS, _HEADS, _WARPS = 16, 4, 2
Shares = tuple[LowRank | None, LowRank | None, LowRank | None]
"""What is to be added to queries, keys and values; all of one rank's strides, see `same_strides`."""


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_THd: Tensor, backwards: bool) -> None:
    """Write every head, turned by its token's angles, into ``out_THd``, which may be ``x_THd`` itself.

    ``backwards`` turns the other way, which is the gradient. The part of a head beyond R is copied.
    """
    heads = x_THd.shape[1]
    _launch(x_THd, (cos_TR, sin_TR), out_THd, (heads, 0), backwards, (None, None, None))


def rotate_added_(qkv_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor, queries: int, keys: int, shares: Shares) -> None:
    """Add the shares to queries, keys and values, which follow each other, and turn queries and keys, in place."""
    _launch(qkv_THd, (cos_TR, sin_TR), qkv_THd, (queries, keys), False, shares)


def same_strides(shares: Shares) -> bool:
    """Whether one launch can read all of them: parts of the same two matrices."""
    found = {(s.left_TR.stride(0), s.right_RF.stride()) for s in shares if s is not None}
    return len(found) <= 1


def _launch(
    x_THd: Tensor,
    tables: tuple[Tensor, Tensor],
    out_THd: Tensor,
    counts: tuple[int, int],
    backwards: bool,
    shares: Shares,
) -> None:
    tokens, heads, size = x_THd.shape
    rotated = tables[0].shape[-1]
    some = next((share for share in shares if share is not None), None)
    strides = (0, 0, 0) if some is None else (some.left_TR.stride(0), *some.right_RF.stride())
    parts: list[Tensor | int] = []
    for share in shares:
        given = share or some
        left_TR, right_RF = (x_THd, x_THd) if given is None else (given.left_TR, given.right_RF)
        parts += [left_TR, right_RF, 0 if share is None else left_TR.shape[1]]
    rank = max(0 if share is None else share.left_TR.shape[1] for share in shares)
    copies = size > rotated and (some is not None or out_THd.data_ptr() != x_THd.data_ptr())
    launch(
        _rotate, (triton.cdiv(tokens, _TOKENS), triton.cdiv(heads, _HEADS)),
        x_THd, *tables, out_THd, *x_THd.stride()[:2], *out_THd.stride()[:2], tokens, heads,
        *counts, rotated // 2, size - rotated, size, -1.0 if backwards else 1.0, *parts, *strides,
        TOKENS=_TOKENS, HEADS=_HEADS, HALF=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(size - rotated) if copies else 0,
        RANK=max(16, triton.next_power_of_2(rank)) if rank else 0, num_warps=_WARPS,
    )  # fmt: skip


@triton.jit
def _added(x, left, right_ptr, right_row, right_column, rank, first, column, inside, RANK: tl.constexpr):
    """A tile of a head with its share."""
    index = tl.arange(0, RANK)[:, None]
    there = (index < rank) & inside
    right = tl.load(right_ptr + index * right_row + (first + column) * right_column, there, other=0.0)
    # In full float32 where the values are: the matrix units' own mode for it would cost three digits.
    return tl.dot(left, right, x, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, out_token, out_head, tokens, heads,
    queries, keys, half, rest, size, sign,
    q_left, q_right, q_rank, k_left, k_right, k_rank, v_left, v_right, v_rank, left_stride, right_row, right_column,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    dtype = out_ptr.dtype.element_ty
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]).to(tl.int64)
    column = tl.arange(0, HALF)[None]
    known = (token < tokens) & (column < half)
    # The table repeats its half, so one half of it is read.
    cos = tl.load(cos_ptr + token * 2 * half + column, known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * 2 * half + column, known, other=0.0).to(tl.float32) * sign
    for number in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + number
        present = head + tl.zeros((1, 1), tl.int32) < heads
        inside = known & present
        source = x_ptr + token * x_token + head * x_head + column
        a = tl.load(source, inside, other=0.0).to(tl.float32)
        b = tl.load(source + half, inside, other=0.0).to(tl.float32)
        if RANK > 0:
            # Which of the three this head belongs to, and its place among its own.
            if head < queries:
                left_ptr, right_ptr, rank, first = q_left, q_right, q_rank, head * size
            elif head < queries + keys:
                left_ptr, right_ptr, rank, first = k_left, k_right, k_rank, (head - queries) * size
            else:
                left_ptr, right_ptr, rank, first = v_left, v_right, v_rank, (head - queries - keys) * size
            index = tl.arange(0, RANK)[None]
            left = tl.load(left_ptr + token * left_stride + index, (token < tokens) & (index < rank), other=0.0)
            there = (column < half) & present
            a = _added(a, left, right_ptr, right_row, right_column, rank, first, column, there, RANK)
            b = _added(b, left, right_ptr, right_row, right_column, rank, first + half, column, there, RANK)
        turned = head < queries + keys
        c, s = tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)
        target = out_ptr + token * out_token + head * out_head + column
        tl.store(target, (a * c - b * s).to(dtype), inside)
        tl.store(target + half, (b * c + a * s).to(dtype), inside)
        if REST > 0:
            beyond = tl.arange(0, REST)[None]
            inside = (token < tokens) & (beyond < rest) & present
            behind = x_ptr + token * x_token + head * x_head + 2 * half + beyond
            kept = tl.load(behind, inside, other=0.0).to(tl.float32)
            if RANK > 0:
                there = (beyond < rest) & present
                kept = _added(
                    kept, left, right_ptr, right_row, right_column, rank, first + 2 * half, beyond, there, RANK
                )
            tl.store(out_ptr + token * out_token + head * out_head + 2 * half + beyond, kept.to(dtype), inside)
