"""Rows of a frozen table that lies on another device than the numbers of the rows: in host memory, for a card.

Shapes: V rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_reference(table_VD: Tensor, ids: Tensor) -> Tensor:
    """Reference: look the rows up where the table is and bring them to the ids, for which a card waits.

    It is also the way for tables that a card cannot read.
    """
    return F.embedding(ids.to(table_VD.device), table_VD).to(ids.device)


def gather(table_VD: Tensor, ids: Tensor) -> Tensor:
    """(...) int64 row numbers -> (..., D), where the numbers are and of the table's dtype; not differentiable."""
    if not (ids.is_cuda and readable(table_VD)):
        return gather_reference(table_VD, ids)
    from jebi.kernels.gpu import gather as gpu

    out_TD = torch.empty((ids.numel(), table_VD.shape[1]), dtype=table_VD.dtype, device=ids.device)
    gpu.gather(table_VD, ids.reshape(-1), out_TD)
    return out_TD.view(*ids.shape, -1)


def readable(table_VD: Tensor) -> bool:
    """Whether a card can read the table where it is."""
    return table_VD.is_cuda or table_VD.is_pinned()
