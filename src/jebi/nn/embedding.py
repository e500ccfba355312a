"""The embedding: a row of the table for every token.

The table is frozen and in the compute dtype, or trained and a float32 master that is cast where it is used. A frozen
one may lie in host memory; a card then reads the rows it needs over the bus.

Shapes: V vocabulary, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jebi.kernels.gather import gather
from jebi.nn.host_weight import HostWeight


class Embedding(nn.Module):
    """``scale * weight[ids]``."""

    weight: nn.Parameter | HostWeight

    def __init__(self, vocabulary: int, width: int, scale: float, dtype: torch.dtype):
        """Build it on the meta device: the checkpoint's table is put in when it arrives.

        Args:
            vocabulary: V.
            width: D.
            scale: factor on the rows; Gemma's is sqrt(D), rounded to ``dtype`` as transformers rounds it.
            dtype: compute dtype.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width, dtype=dtype, device="meta"), requires_grad=False)
        self.scale = torch.tensor(scale, dtype=dtype, device="cpu").item()
        self.dtype = dtype

    def store(self, weight: nn.Parameter | HostWeight) -> None:
        """Take a table, wherever it lies."""
        del self.weight
        self.weight = weight

    @property
    def num_embeddings(self) -> int:
        """V, under the name that `torch.nn.Embedding` has for it."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """D, likewise."""
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., D) in the compute dtype; differentiable by a trained table."""
        weight = self.weight
        rows = gather(weight.weight_NK, ids) if isinstance(weight, HostWeight) else F.embedding(ids, weight)
        rows = rows.to(self.dtype)
        return rows if self.scale == 1 else rows * self.scale

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.dtype}"
