"""8-bit weights in blocks to a dense matrix in one pass over the bytes.

Shapes: N rows, K columns; codes, scales and their meaning are `quant.int8`'s.
"""

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch

_VALUES = 2048


def dequantize(codes: Tensor, scales: Tensor, out_NK: Tensor) -> None:
    """Write the matrix into ``out_NK``, whose rows may be strided.

    Args:
        codes: int8, one a value, row after row.
        scales: float32, one a block of 64 values.
        out_NK: float32, bfloat16 or float16.
    """
    rows, columns = out_NK.shape
    values = rows * columns
    launch(
        _dequantize, (triton.cdiv(values, _VALUES),),
        codes, scales, out_NK, values, out_NK.stride(0), COLUMNS=columns, VALUES=_VALUES, num_warps=4,
    )  # fmt: skip


@triton.jit
def _dequantize(codes_ptr, scales_ptr, out_ptr, values, out_stride, COLUMNS: tl.constexpr, VALUES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * VALUES
    index = start + tl.arange(0, VALUES)
    block = start // 64 + tl.arange(0, VALUES // 64)
    code = tl.load(codes_ptr + index, index < values, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + block, block * 64 < values, other=0.0)
    dense = tl.reshape(tl.reshape(code, (VALUES // 64, 64)) * scale[:, None], (VALUES,))
    target = out_ptr + (index // COLUMNS) * out_stride + index % COLUMNS
    tl.store(target, dense.to(out_ptr.dtype.element_ty), index < values)
