"""``x W^T`` for 3 to 16 rows of ``x`` on tensor cores, W read once as it is stored.

Compute capability 8.0 and newer; weights, epilogue and shapes are `gpu.few_rows`'s. A warp takes a block of 64 columns
of all of a program's rows: it multiplies bare levels, and the block's scale meets the sums of its 64 products. The
warps' sums are added at the end.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.dependent import await_inputs, let_next_begin
from jebi.kernels.gpu.few_rows import (
    Epilogue,
    Stored,
    epilogue_arguments,
    epilogue_constants,
    fetch_rows,
    finish,
    levels_of,
    overlap,
    row_of,
    scale_of,
    weight_arguments,
)

MOST = 16


@dataclass(frozen=True)
class DotTile:
    """What a program has."""

    rows: int
    """At least 16."""
    warps: int
    """Each has every so many-th block of columns."""
    stages: int
    """Blocks under way at once."""


def tile_of(stored: Stored) -> DotTile:
    """How a product is cut, by its shape."""
    return DotTile(32 if stored.shape[0] > 4096 else 16, 4 if stored.shape[1] < 8192 else 8, 3)


def product(x_MK: Tensor, stored: Stored, after: Epilogue, out_MN: Tensor, tile: DotTile | None = None) -> None:
    """As `gpu.few_rows.product`, for at most 16 rows; K a multiple of 64."""
    tokens, (outputs, columns) = x_MK.shape[0], stored.shape
    assert tokens <= MOST
    tile = tile or tile_of(stored)
    _dot[(triton.cdiv(outputs, tile.rows),)](
        x_MK, *weight_arguments(stored, x_MK), *epilogue_arguments(after, x_MK, out_MN),
        x_MK.stride(0), tokens, outputs,
        COLUMNS=columns, KIND=stored.kind, **epilogue_constants(after), NESTED=stored.nested is not None,
        SHUFFLE=x_MK.is_cuda, **overlap(stored), ROWS=tile.rows, WARPS=tile.warps, STAGES=tile.stages,
        num_warps=tile.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rank"])
def _dot(
    x_ptr, weight_ptr, scales_ptr, nested_ptr, offsets_ptr, levels_ptr, codes_ptr,
    bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
    left_stride, right_stride, residual_stride, out_stride, rank, scale, x_stride, tokens, outputs,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, OVERLAP: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if OVERLAP:
        let_next_begin()
        fetch_rows(weight_ptr, row, outputs, COLUMNS, KIND, ROWS, 2 if ACTIVATION >= 0 else 1)
        await_inputs()
    found = row_of(row, outputs, ROWS, ACTIVATION)
    long = found.to(tl.int64)
    token = tl.arange(0, 16)
    here = token < tokens
    warp = tl.arange(0, WARPS)
    column = tl.arange(0, 64)
    total = tl.zeros((WARPS, 16, ROWS), tl.float32)
    for start in tl.range(0, COLUMNS // 64, WARPS, num_stages=STAGES):
        block = start + warp
        inside = block < COLUMNS // 64
        x = tl.load(
            x_ptr + token[None, :, None] * x_stride + (block[:, None, None] * 64 + column[None, None]),
            inside[:, None, None] & here[None, :, None], other=0.0,
        )  # fmt: skip
        if KIND == 2:
            words = tl.load(
                weight_ptr + long[None, :, None] * (COLUMNS // 8)
                + (block[:, None, None] * 8 + tl.arange(0, 8)[None, None]),
                inside[:, None, None], other=0,
            )  # fmt: skip
            w1, w0, w3, w2, w5, w4, w7, w6 = levels_of(words, levels_ptr, SHUFFLE)
            # join puts its two side by side: the last is the first bit of a value's number.
            even = tl.join(tl.join(w0.to(x.dtype), w4.to(x.dtype)), tl.join(w2.to(x.dtype), w6.to(x.dtype)))
            odd = tl.join(tl.join(w1.to(x.dtype), w5.to(x.dtype)), tl.join(w3.to(x.dtype), w7.to(x.dtype)))
            weight = tl.reshape(tl.join(even, odd), (WARPS, ROWS, 64))
        else:
            weight = tl.load(
                weight_ptr + long[None, :, None] * COLUMNS + (block[:, None, None] * 64 + column[None, None]),
                inside[:, None, None], other=0,
            ).to(x.dtype)  # fmt: skip
        part = tl.dot(x, tl.permute(weight, (0, 2, 1)), input_precision="ieee")
        if KIND > 0:
            scales = scale_of(
                long[None, :] * (COLUMNS // 64) + block[:, None], inside[:, None],
                scales_ptr, nested_ptr, offsets_ptr, codes_ptr, NESTED,
            )  # fmt: skip
            part *= scales[:, None, :]
        total += part
    finish(
        tl.sum(total, 0), token, found, row, bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
        left_stride, right_stride, residual_stride, out_stride, rank, scale, tokens, outputs,
        BIAS, RANK, ACTIVATION, RESIDUAL, 16, ROWS,
    )  # fmt: skip
