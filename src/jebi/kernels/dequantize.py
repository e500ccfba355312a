"""Packed weights to dense ones on whichever device: through their kernels on a card, else as `quant` does it.

Shapes: N rows, K columns.
"""

from functools import lru_cache

import torch
from torch import Tensor

from jebi.quant import dynamic8
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import LEVELS, NF4Weight

PackedWeight = NF4Weight | Int8Weight
"""A weight that is not stored dense."""


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in ``dtype``."""
    out_NK = torch.empty(weight.shape, dtype=dtype, device=next(weight.buffers()).device)
    dense_into(weight, out_NK)
    return out_NK


def dense_into(weight: PackedWeight, out_NK: Tensor) -> None:
    """The matrix into ``out_NK``, whose rows may be strided."""
    if out_NK.is_cuda and weight.block == 64:
        if isinstance(weight, Int8Weight):
            from jebi.kernels.gpu import int8

            int8.dequantize(weight.codes, weight.scales, out_NK)
            return
        nested_absmax, offset = weight.nested_absmax, weight.offset
        if nested_absmax is not None and offset is not None:
            from jebi.kernels.gpu import nf4

            nf4.dequantize(weight.packed, weight.absmax, nested_absmax, offset, tables_on(out_NK.device), out_NK)
            return
    weight.dense(out_NK.dtype, out_NK)


@lru_cache(maxsize=8)
def tables_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """NF4's levels and the codes of its scales, as the kernels take them."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return levels, dynamic8.code_on(True, device)
