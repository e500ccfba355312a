"""The low-rank adapter of one linear map (LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732).

The matrices are float32 master weights; they are cast to the activations' dtype where they are used. Two extensions
live here because they change what the matrices multiply: a frozen half beside the trained one, which PiSSA takes back
from the base (arXiv:2404.02948), and DoRA's magnitudes (arXiv:2402.09353), whose arithmetic is `dora`'s. Which maps
get an adapter, how it starts, and files, are the `adapters` room's.

Shapes: T tokens, r rank, R rank with the frozen half, K inputs, N outputs.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lora(nn.Module):
    """``x -> scale * (dropout(x) A^T) B^T`` beside a linear map, the product of a frozen half added."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, device: torch.device):
        super().__init__()
        self.A_rK = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32, device=device))
        self.B_Nr = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32, device=device))
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        self.frozen_A_rK: Tensor | None
        """The frozen half's matrices, of the same shapes; both or none."""
        self.frozen_B_Nr: Tensor | None
        self.register_buffer("frozen_A_rK", None, persistent=False)
        self.register_buffer("frozen_B_Nr", None, persistent=False)
        self.magnitude_N: nn.Parameter | None = None
        """DoRA: the length of each row of the adapted weight, trained."""
        self.base_squares_N: Tensor | None
        """DoRA: the squared length of each row of the base's weight, once it was needed."""
        self.register_buffer("base_squares_N", None, persistent=False)
        self.stand_in: Lora | None = None
        """What takes part while this adapter is switched off: nothing, or what LoftQ took out of the base."""
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None

    def reset(self, generator: torch.Generator) -> None:
        """Draw A as Kaiming-uniform with a = sqrt(5), as PEFT does, and zero B: the map starts unchanged."""
        bound = 1 / math.sqrt(self.A_rK.shape[1])
        drawn_rK = torch.empty(self.A_rK.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.A_rK.copy_(drawn_rK)
            self.B_Nr.zero_()

    def reset_gaussian(self, generator: torch.Generator) -> None:
        """Draw A as normal with a deviation of 1 / r, as PEFT's ``gaussian``, and zero B."""
        rank = self.A_rK.shape[0]
        with torch.no_grad():
            self.A_rK.copy_(torch.empty(self.A_rK.shape).normal_(0, 1 / rank, generator=generator))
            self.B_Nr.zero_()

    def freeze_start(self, A_rK: Tensor, B_Nr: Tensor) -> None:
        """Start at ``scale * B A`` and carry ``-scale * B A`` frozen, so that the map starts unchanged (PiSSA)."""
        with torch.no_grad():
            self.A_rK.copy_(A_rK)
            self.B_Nr.copy_(B_Nr)
        self.frozen_A_rK, self.frozen_B_Nr = self.A_rK.detach().clone(), -self.B_Nr.detach()

    def down(self, dtype: torch.dtype) -> Tensor:
        """A (R, K) in ``dtype``, the trained rows first; differentiable."""
        A_rK = self.A_rK.to(dtype)
        return A_rK if self.frozen_A_rK is None else torch.cat([A_rK, self.frozen_A_rK.to(dtype)])

    def up(self, dtype: torch.dtype) -> Tensor:
        """``scale * B`` (N, R) in ``dtype``, the trained columns first; differentiable."""
        B_Nr = (self.B_Nr * self.scale).to(dtype)
        return B_Nr if self.frozen_B_Nr is None else torch.cat([B_Nr, (self.frozen_B_Nr * self.scale).to(dtype)], 1)

    @property
    def rank(self) -> int:
        """R, the frozen half included."""
        return self.A_rK.shape[0] * (1 if self.frozen_A_rK is None else 2)

    def cast_into(self, down_RK: Tensor, up_NR: Tensor) -> None:
        """Write `down` and `up` into these, in their dtype; one launch a matrix where there is no frozen half."""
        rank = self.A_rK.shape[0]
        down_RK[:rank] = self.A_rK
        torch.mul(self.B_Nr, self.scale, out=up_NR[:, :rank])
        if self.frozen_A_rK is not None and self.frozen_B_Nr is not None:
            down_RK[rank:] = self.frozen_A_rK
            torch.mul(self.frozen_B_Nr, self.scale, out=up_NR[:, rank:])

    def compress(self, x_TK: Tensor) -> Tensor:
        """``x A^T`` (T, R), which `linear.project` makes and its backward needs."""
        return x_TK @ self.down(x_TK.dtype).t()

    def keep_cast(self, dtype: torch.dtype | None, gain_N: Tensor | None = None) -> None:
        """Keep both matrices in ``dtype``, the scale within (decoding reads them once a token), or drop them.

        DoRA's gain, a quotient of the trained and the present row lengths, is kept along.
        """
        with torch.no_grad():
            gain_N = gain_N.to(dtype) if gain_N is not None else None
            self._kept = None if dtype is None else (self.down(dtype), self.up(dtype), gain_N)

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What `keep_cast` made, where no gradient is wanted."""
        return None if torch.is_grad_enabled() else self._kept

    def drop(self, x: Tensor) -> Tensor:
        """The adapter's input after dropout; ``x`` itself where nothing is dropped."""
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x

    def product(self, x: Tensor) -> Tensor:
        """What the matrices make of an input that has been through `drop`, in its dtype; differentiable."""
        A_RK, B_NR = self.kept[:2] if self.kept is not None else (self.down(x.dtype), self.up(x.dtype))
        return F.linear(F.linear(x, A_RK), B_NR)

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's addition to the map's output, in ``x``'s dtype; differentiable."""
        return self.product(self.drop(x))
