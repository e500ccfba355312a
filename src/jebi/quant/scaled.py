"""8-bit checkpoints of others: a number of one byte times the scale of its row, its block or the whole matrix.

Read only: such a matrix is made dense and then held as asked. Where the scales lie, and under which names, is
`models.prequantised`'s business.

Shape suffixes: N rows, K columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jebi.errors import WeightsError


def scaled(numbers_NK: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Return ``number * scale`` as float32 [N, K].

    Args:
        numbers_NK: float8 or int8.
        scale: of any floating dtype: one number; or one a row, [N] or [N, 1]; or, with ``block``, one a block,
            [ceil(N / rows), ceil(K / columns)].
        block: rows and columns of a block; the last ones may be cut off.

    Raises:
        WeightsError: the scale has another shape.

    The rule of transformers' ``Fp8Dequantize`` (block-wise, "fp8"), of fbgemm's row-wise and of compressed-tensors'
    "float-quantized" weights.
    """
    rows, columns = numbers_NK.shape
    dense = numbers_NK.float()
    factors = scale.float()
    if not scale.dtype.is_floating_point:
        raise WeightsError(f"its scale is of dtype {scale.dtype}, not a floating one")
    if factors.numel() == 1:
        return dense.mul_(factors.view(()))
    if block is None:
        if factors.numel() != rows:
            raise WeightsError(f"its scale has shape {list(scale.shape)}, which is neither one number nor one a row")
        return dense.mul_(factors.view(rows, 1))
    high, wide = block
    if tuple(factors.shape) != (-(-rows // high), -(-columns // wide)):
        raise WeightsError(
            f"its scale has shape {list(scale.shape)}, not one for each block of {high} by {wide} values"
        )
    for index, factors_of_rows in enumerate(factors):
        # Row by row of blocks, so that the scales are never as large as the matrix.
        dense[index * high : (index + 1) * high].mul_(factors_of_rows.repeat_interleave(wide)[:columns])
    return dense


def llm_int8(numbers_NK: Tensor, largest_N: Tensor) -> Tensor:
    """Return ``number * largest of its row / 127`` as float32 [N, K]: the weights of LLM.int8 (arXiv:2208.07339).

    The products are taken in the order of bitsandbytes' ``int8_vectorwise_dequant``.
    """
    if largest_N.numel() != numbers_NK.shape[0]:
        raise WeightsError(f"it has {numbers_NK.shape[0]} rows, but scales for {largest_N.numel()}")
    return numbers_NK.to(torch.float32).mul_(largest_N.float().view(-1, 1)).mul_(1 / 127)
