"""The frozen base of a group of maps as one matrix, and the two products a layer makes with it.

Biases and adapters are added by `group`.

Shapes: T tokens, K inputs, N outputs of all maps.
"""

from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from jebi.kernels.dequantize import dense_into
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Linear


class BaseProduct(Protocol):
    """``x W^T`` and ``dy W`` of maps laid below each other."""

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """``x W^T``, ``residual_TN`` added where given, in a new tensor (T, N)."""
        ...

    def backward(self, dy_TN: Tensor) -> Tensor:
        """``dy W`` in a new tensor (T, K)."""
        ...

    def kept(self) -> Tensor | None:
        """The matrix (N, K) in the compute dtype, where it is held in that form."""
        ...


def spans(maps: list[Linear]) -> list[tuple[Linear, int, int]]:
    """Each map with its first row below each other and the one behind its last."""
    ends = list(accumulate(linear.out_features for linear in maps))
    return list(zip(maps, [0, *ends], ends))


class Scratch:
    """One buffer for weights that are dequantised at every use, as large as the largest of them."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def matrix(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A (rows, columns) matrix in the buffer; what was in it before is lost."""
        size = rows * columns * dtype.itemsize
        if self._flat is None or self._flat.numel() < size:
            self._flat = torch.empty(size, dtype=torch.uint8, device=device)
        return self._flat[:size].view(dtype).view(rows, columns)


class DenseProduct:
    """In the compute dtype."""

    def __init__(self, maps: list[Linear], scratch: Scratch | None, stay: bool = True):
        """Lay the maps below each other.

        Args:
            maps: of one input, their weights frozen.
            scratch: where 4-bit and 8-bit weights are dequantised at every use; None keeps them dequantised. Weights
                that are dense already move into the one matrix, of which the maps' own become parts.
            stay: whether the weights are there all the time; of a layer that is not (`nn.sharding`) dense ones are
                laid together in ``scratch`` too, at every use.
        """
        self._spans = spans(maps)
        self._size = self._spans[-1][2], maps[0].in_features
        self._dtype, self._device = maps[0].dtype, maps[0].device()
        packed = any(not isinstance(linear.weight, nn.Parameter) for linear in maps)
        self._scratch = scratch if packed or not stay else None
        self._weight_NK = None if self._scratch is not None else self._lay()

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """See `BaseProduct`."""
        weight_KN = self._weight().t()
        return x_TK @ weight_KN if residual_TN is None else torch.addmm(residual_TN, x_TK, weight_KN)

    def backward(self, dy_TN: Tensor) -> Tensor:
        """See `BaseProduct`."""
        return dy_TN @ self._weight()

    def kept(self) -> Tensor | None:
        """See `BaseProduct`."""
        return self._weight_NK

    def _weight(self) -> Tensor:
        if self._weight_NK is not None:
            return self._weight_NK
        assert self._scratch is not None
        weight_NK = self._scratch.matrix(*self._size, self._dtype, self._device)
        self._fill(weight_NK)
        return weight_NK

    def _lay(self) -> Tensor:
        """All weights in one matrix; dense ones become parts of it, so that they are not held twice."""
        if len(self._spans) == 1 and isinstance(self._spans[0][0].weight, nn.Parameter):
            return self._spans[0][0].weight.detach()
        weight_NK = torch.empty(self._size, dtype=self._dtype, device=self._device)
        self._fill(weight_NK)
        for linear, start, end in self._spans:
            if isinstance(linear.weight, nn.Parameter):
                linear.store(nn.Parameter(weight_NK[start:end], requires_grad=False))
        return weight_NK

    def _fill(self, weight_NK: Tensor) -> None:
        for linear, start, end in self._spans:
            if isinstance(linear.weight, nn.Parameter):
                weight_NK[start:end] = linear.weight
            else:
                assert not isinstance(linear.weight, HostWeight), "only a head is there"
                dense_into(linear.weight, weight_NK[start:end])
