"""8-bit floats (e4m3) with a scale a row: rows of activations quantised, NF4 weights turned into them.

Compute capability 8.9 and newer, whose conversion to e4m3 saturates and keeps NaN. Results are of whatever dtype the
place given has: into float32 go the scaled numbers before they are rounded, for Triton's interpreter, which does not
round to e4m3 as cards do.

Shapes: T tokens, N rows of a weight, K columns; scales and their meaning are `quant.fp8`'s, NF4 is `quant.nf4`'s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch
from jebi.quant.fp8 import LARGEST, SMALLEST

_TILE = 128, 4
"""Rows of a weight in one program, and its warps; a program has one block of 64 columns."""


def quantize_rows(x_TK: Tensor, out_TK: Tensor) -> Tensor:
    """Write the numbers into the contiguous ``out_TK``; the scales (T, 1), float32. Rows of ``x`` may be strided."""
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    rows, width = x_TK.shape
    scale_T1 = torch.empty(rows, 1, dtype=torch.float32, device=x_TK.device)
    block = triton.next_power_of_2(width)
    launch(
        _quantize_rows, (rows,),
        x_TK, out_TK, scale_T1, x_TK.stride(0), width, LARGEST=LARGEST, SMALLEST=SMALLEST,
        BLOCK=block, num_warps=min(32, max(1, block // 1024)),
    )  # fmt: skip
    return scale_T1


def from_nf4(stored: tuple[Tensor, ...], shape: tuple[int, int], scale: Tensor, out: Tensor, transposed: bool) -> None:
    """Write a weight (N, K) of whole blocks a row into ``out``: (N, K), or (K, N) where ``transposed``.

    Args:
        stored: packed, absmax, nested_absmax, offset and the two tables, as `gpu.nf4.dequantize` takes them.
        shape: N and K.
        scale: float32, N of them, one a row; where ``transposed`` K of them, one a column.
        out: rows may be strided.
    """
    rows, columns = shape
    tile, warps = _TILE
    launch(
        _from_nf4, (columns // 64, triton.cdiv(rows, tile)),
        *stored, scale, out, rows, out.stride(0),
        COLUMNS=columns, TRANSPOSED=transposed, TILE=tile, num_warps=warps,
        enable_fp_fusion=False,  # a fused scale would differ from `quant.nf4`'s in its last bit
    )  # fmt: skip


@triton.jit
def _scale_of(largest, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """`quant.fp8.scale_of`."""
    return tl.where(largest > SMALLEST, largest * (1 / LARGEST), 1.0)


@triton.jit
def _quantize_rows(
    x_ptr, out_ptr, scale_ptr, x_stride, width,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(x), 0), LARGEST, SMALLEST)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + columns, (x * tl.div_rn(1.0, scale)).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _from_nf4(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, levels_ptr, codes_ptr, scale_ptr, out_ptr, rows, out_stride,
    COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * 64 + tl.arange(0, 64)
    inside = row < rows
    block = row * (COLUMNS // 64) + tl.program_id(0)
    code = tl.load(absmax_ptr + block, inside, other=0).to(tl.int32)
    absmax = tl.load(codes_ptr + code) * tl.load(nested_ptr + block // 256, inside, other=0.0) + tl.load(offset_ptr)
    byte = (block * 32)[:, None] + tl.arange(0, 32)[None, :]
    pair = tl.load(packed_ptr + byte, inside[:, None], other=0)
    if TRANSPOSED:
        # Turned while it is packed, which moves an eighth of the bytes.
        pair = tl.trans(pair)
        index = tl.reshape(tl.permute(tl.join(pair >> 4, pair & 15), (0, 2, 1)), (64, TILE)).to(tl.int32)
        dense = tl.load(levels_ptr + index) * absmax[None, :]
        numbers = dense * tl.div_rn(1.0, tl.load(scale_ptr + column))[:, None]
        target = out_ptr + column.to(tl.int64)[:, None] * out_stride + row[None, :]
        tl.store(target, numbers.to(out_ptr.dtype.element_ty), inside[None, :])
    else:
        dense = tl.load(levels_ptr + tl.interleave(pair >> 4, pair & 15).to(tl.int32)) * absmax[:, None]
        numbers = dense * tl.div_rn(1.0, tl.load(scale_ptr + row, inside, other=1.0))[:, None]
        target = out_ptr + row[:, None] * out_stride + column[None, :]
        tl.store(target, numbers.to(out_ptr.dtype.element_ty), inside[:, None])
