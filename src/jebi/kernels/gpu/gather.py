"""Rows of a table by their numbers; the table may lie in page-locked host memory, where the card reads just those rows.

Triton's launcher asks the driver at which address the card sees the table, so nothing waits for the host, in a CUDA
graph neither. A Llama 3.1 8B row is 8 KiB: 2,048 tokens bring 16 MiB over the bus.

Shapes: T tokens, V rows, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch

_BLOCK = 1024


def gather(table_VD: Tensor, ids_T: Tensor, out_TD: Tensor) -> None:
    """Write the rows into ``out_TD``; a number that the table does not have gives a row of NaN.

    Args:
        table_VD: any float dtype, rows contiguous; on the card or in page-locked host memory.
        ids_T: int64.
        out_TD: contiguous, on the card, of the table's dtype.
    """
    rows, width = table_VD.shape
    grid = (ids_T.shape[0], triton.cdiv(width, _BLOCK))
    if ids_T.shape[0]:
        launch(_gather, grid, table_VD, ids_T, out_TD, rows, width, table_VD.stride(0), BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _gather(table_ptr, ids_ptr, out_ptr, rows, width, stride, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    readable = tl.where((row >= 0) & (row < rows), width, 0)
    values = tl.load(table_ptr + row * stride + column, column < readable, other=float("nan"))
    tl.store(out_ptr + token * width + column, values, column < width)
