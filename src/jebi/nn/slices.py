"""A frozen head that is not dense on its card, one slice of rows after the other: copied out of host memory, or
dequantised.

What is computed of the slices is `kernels.sliced_cross_entropy`'s for the loss, and `sliced_product` for logits.

Shapes: T tokens, N rows, K columns, S rows of a slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from jebi.config.limits import SLICE_BYTES
from jebi.kernels.dequantize import PackedWeight, dense_into
from jebi.nn.host_weight import HostWeight


@dataclass(frozen=True)
class WeightSlices:
    """Slices of a weight in a dtype, each dense on the card until the next is asked for."""

    weight: PackedWeight | HostWeight
    """The weight, held in that dtype where it is in host memory."""
    dtype: torch.dtype
    """The slices'."""

    @property
    def vocabulary(self) -> int:
        """N."""
        return self.weight.shape[0]

    @property
    def most(self) -> int:
        """Rows of every slice but the last."""
        rows, columns = self.weight.shape
        unit = 1 if isinstance(self.weight, HostWeight) else self.weight.unit
        return min(rows, max(1, SLICE_BYTES // (columns * self.dtype.itemsize * unit)) * unit)

    def __iter__(self) -> Iterator[Tensor]:
        """(S, K) each."""
        weight = self.weight
        return _copied(weight, self.most) if isinstance(weight, HostWeight) else self._dequantised(weight)

    def _dequantised(self, weight: PackedWeight) -> Iterator[Tensor]:
        rows, most = weight.shape[0], self.most
        buffer_SK = torch.empty(most, weight.shape[1], dtype=self.dtype, device=next(weight.buffers()).device)
        for start in range(0, rows, most):
            slice_SK = buffer_SK[: rows - start]
            dense_into(weight.rows(start, start + most), slice_SK)
            yield slice_SK


def _copied(weight: HostWeight, most: int) -> Iterator[Tensor]:
    """On a card the next slice is on its way, on a stream of its own, while this one is computed with."""
    parts = weight.weight_NK.split(most)
    if weight.device.type != "cuda":
        yield from parts
        return
    compute, copies = torch.cuda.current_stream(weight.device), _stream(weight.device)
    buffers = [torch.empty_like(part, device=weight.device) for part in parts[:2]]

    def fetch(number: int) -> torch.cuda.Event:
        # What was launched so far may still read the buffer; nothing later does before the copy is awaited.
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            buffers[number % 2][: len(parts[number])].copy_(parts[number], non_blocking=True)
        done: torch.cuda.Event = copies.record_event()
        return done

    arrived = fetch(0)
    for number, part in enumerate(parts):
        compute.wait_event(arrived)
        if number + 1 < len(parts):
            arrived = fetch(number + 1)
        yield buffers[number % 2][: len(part)]


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def sliced_product(x: Tensor, slices: WeightSlices) -> Tensor:
    """``x W^T`` (..., N) of (..., K), differentiable by ``x``, without the whole weight."""
    y: Tensor = _SlicedProduct.apply(x, slices)
    return y


class _SlicedProduct(torch.autograd.Function):
    """It keeps nothing: the backward goes through the slices again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slices: WeightSlices) -> Tensor:
        ctx.slices = slices
        y_TN = x.new_empty(x.shape[:-1].numel(), slices.vocabulary)
        _into(x.reshape(-1, x.shape[-1]), slices, y_TN)
        return y_TN.view(*x.shape[:-1], slices.vocabulary)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy_TN = grads[0].flatten(0, -2)
        # In float32, since it is a sum over slices.
        dx_TK = dy_TN.new_zeros(dy_TN.shape[0], ctx.slices.weight.shape[1], dtype=torch.float32)
        first = 0
        for slice_SK in ctx.slices:
            dx_TK += dy_TN[:, first : first + len(slice_SK)] @ slice_SK
            first += len(slice_SK)
        return dx_TK.to(dy_TN.dtype).view(*grads[0].shape[:-1], dx_TK.shape[1]), None


def _into(x_TK: Tensor, slices: WeightSlices, y_TN: Tensor) -> None:
    first = 0
    for slice_SK in slices:
        torch.mm(x_TK, slice_SK.t(), out=y_TN[:, first : first + len(slice_SK)])
        first += len(slice_SK)
