"""A frozen matrix that lies in host memory while the model computes on a card: the embedding's table, or the head.

How it is used from there is `nn.embedding`'s and `nn.slices`'.

Shapes: N rows, K columns.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jebi.kernels.gather import readable

logger = logging.getLogger(__name__)


class HostWeight(nn.Module):
    """The matrix, and the card that it serves.

    It is neither a parameter nor a buffer. Moves and casts of the model pass it by, nothing broadcasts it, and the
    device that a model reports, that of its first parameter, stays the card.
    """

    weight_NK: Tensor
    """In page-locked memory where there is a card."""
    device: torch.device
    """The card."""

    def __init__(self, weight_NK: Tensor, device: torch.device):
        """Copy a dense matrix, wherever it is, into host memory for a model on ``device``."""
        super().__init__()
        self.weight_NK, self.device = _locked(weight_NK.detach()), device

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.weight_NK.shape

    @property
    def dtype(self) -> torch.dtype:
        """The matrix's dtype."""
        return self.weight_NK.dtype

    @property
    def locked(self) -> bool:
        """Whether a card reaches it without the host's help, as in a CUDA graph."""
        return readable(self.weight_NK)

    def dense(self) -> Tensor:
        """A copy of the whole matrix on the card."""
        return self.weight_NK.to(self.device, non_blocking=True)

    def extra_repr(self) -> str:
        """What it is, for ``print(model)``."""
        return f"{tuple(self.shape)}, {self.dtype}, in host memory for {self.device}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostWeight":
        self.device = fn(torch.empty(0, dtype=self.dtype, device=self.device)).device
        return self


def matrix(weight: nn.Parameter | HostWeight) -> Tensor:
    """The matrix, wherever it lies."""
    return weight.weight_NK if isinstance(weight, HostWeight) else weight


def _locked(weight_NK: Tensor) -> Tensor:
    """A copy in page-locked memory where there is a card; torch's allocator rounds it up to a power of two."""
    if torch.cuda.is_available():
        try:
            host_NK = torch.empty(weight_NK.shape, dtype=weight_NK.dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            gib = weight_NK.nbytes / 2**30
            logger.warning(f"{gib:.2f} GiB of host memory cannot be page-locked, so training will be slower: {error}")
        else:
            return host_NK.copy_(weight_NK)
    return weight_NK.to("cpu", copy=True)
