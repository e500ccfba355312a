"""NF4 with double quantisation to a dense matrix, scales included, in one pass over the bytes.

Shapes: N rows, K columns; levels, scales and their meaning are `quant.nf4`'s.
"""

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch

_VALUES = 1024


def dequantize(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor, offset: Tensor, tables: tuple[Tensor, Tensor], out_NK: Tensor
) -> None:
    """Write the matrix into ``out_NK``, whose rows may be strided.

    Args:
        packed: uint8, two levels a byte, the first in the high half.
        absmax: uint8, one a block of 64 values.
        nested_absmax: float32, one a block of 256 of those.
        offset: float32 scalar added to every scale.
        tables: the 16 levels and the 256 codes of the scales, float32.
        out_NK: float32, bfloat16 or float16.
    """
    rows, columns = out_NK.shape
    values = rows * columns
    launch(
        _dequantize, (triton.cdiv(values, _VALUES),),
        packed, absmax, nested_absmax, offset, *tables, out_NK, values, out_NK.stride(0),
        COLUMNS=columns, VALUES=_VALUES, num_warps=4,
        enable_fp_fusion=False,  # a fused scale would differ from `quant.nf4`'s in its last bit
    )  # fmt: skip


@triton.jit
def _dequantize(
    packed_ptr, absmax_ptr, nested_ptr, offset_ptr, levels_ptr, codes_ptr, out_ptr, values, out_stride,
    COLUMNS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * VALUES
    byte = start // 2 + tl.arange(0, VALUES // 2)
    pair = tl.load(packed_ptr + byte, byte < (values + 1) // 2, other=0).to(tl.int32)
    level = tl.load(levels_ptr + tl.interleave(pair >> 4, pair & 15))
    block = start // 64 + tl.arange(0, VALUES // 64)
    inside = block * 64 < values
    code = tl.load(absmax_ptr + block, inside, other=0).to(tl.int32)
    scale = tl.load(codes_ptr + code) * tl.load(nested_ptr + block // 256, inside, other=0.0) + tl.load(offset_ptr)
    dense = tl.reshape(tl.reshape(level, (VALUES // 64, 64)) * scale[:, None], (VALUES,))
    index = start + tl.arange(0, VALUES)
    target = out_ptr + (index // COLUMNS) * out_stride + index % COLUMNS
    tl.store(target, dense.to(out_ptr.dtype.element_ty), index < values)
