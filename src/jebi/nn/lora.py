"""The low-rank adapter of one linear map (LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732).

Which maps get one, and files, are the `adapters` room's. The matrices are float32 master weights; they are cast to
the activations' dtype where they are used.

Shapes: r rank, K inputs, N outputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lora(nn.Module):
    """``x -> scale * (dropout(x) A^T) B^T`` beside a frozen linear map."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, device: torch.device):
        super().__init__()
        self.A_rK = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.B_Nr = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        self._kept: tuple[Tensor, Tensor] | None = None

    def reset(self, generator: torch.Generator) -> None:
        """Draw A as Kaiming-uniform with a = sqrt(5), as PEFT does, and zero B: the map starts unchanged."""
        bound = 1 / math.sqrt(self.A_rK.shape[1])
        drawn_rK = torch.empty(self.A_rK.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.A_rK.copy_(drawn_rK)
            self.B_Nr.zero_()

    def keep_cast(self, dtype: torch.dtype | None) -> None:
        """Keep both matrices in ``dtype``, the scale within (decoding reads them once a token), or drop them."""
        A_rK, B_Nr = self.A_rK.detach(), self.B_Nr.detach() * self.scale
        self._kept = None if dtype is None else (A_rK.to(dtype), B_Nr.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's addition to the map's output, in ``x``'s dtype; differentiable."""
        if self._kept is not None and not torch.is_grad_enabled():
            return F.linear(F.linear(x, self._kept[0]), self._kept[1])
        x = F.dropout(x, self.dropout, training=self.training and self.dropout > 0)
        return F.linear(F.linear(x, self.A_rK.to(x.dtype)), self.B_Nr.to(x.dtype)) * self.scale
