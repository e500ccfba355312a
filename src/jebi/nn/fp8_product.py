"""The frozen products of one group of maps in 8-bit floats: ``x W^T`` and ``dy W``, scaled by rows of both operands.

Biases and adapters are `nn.group`'s. The named settings, ``compute="fp8"`` and ``"fp8_backward"``, and who may use them
are `models.compute`'s.

Shapes: T tokens, K inputs, N outputs of all maps.
"""

import torch
from torch import Tensor, nn

from jebi.kernels.scaled_product import columns_into, largest, product, quantized, rows_into
from jebi.nn.base_product import DenseProduct, Scratch, spans
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Linear
from jebi.quant.fp8 import Fp8Rows, scale_of


class Fp8Product:
    """The maps' weights below each other, in 8 bits twice: by rows, and the transpose by rows of it.

    A card multiplies rows by rows only, and a scale is a factor of a whole row: the backward needs the other copy, with
    scales of its own. Where the backward alone is taken in 8 bits, `DenseProduct` holds the weights for the forward.
    """

    def __init__(self, maps: list[Linear], scratch: Scratch | None, forward: bool = True):
        """Find the scales, and lay the copies where they are kept.

        Args:
            maps: of one input, their weights frozen.
            scratch: where copies are made of packed weights at every use; None keeps both. Maps whose weights are all
                dense are laid once whatever this says; the originals stay beside the copies, since generation and
                saving read them.
            forward: whether the forward is taken in 8 bits too, or in the compute dtype.
        """
        # First of all, since it moves dense weights.
        self._exact = None if forward else DenseProduct(maps, scratch)
        weights = [linear.weight for linear in maps if not isinstance(linear.weight, HostWeight)]
        assert len(weights) == len(maps), "only a head is there"
        self._spans = [(weight, start, end) for weight, (_, start, end) in zip(weights, spans(maps))]
        """Each map's weight with its first row and the one behind its last."""
        self._size = self._spans[-1][2], maps[0].in_features
        self._dtype = maps[0].dtype
        rows, columns = zip(*(largest(weight) for weight in weights))
        self._scale_N1 = scale_of(torch.cat(rows))
        self._scale_K1 = scale_of(torch.cat(columns, dim=1).amax(1, keepdim=True))
        packed = any(not isinstance(weight, nn.Parameter) for weight in weights)
        self._scratch = scratch if packed else None
        self._kept_NK = self._rows() if self._scratch is None and forward else None
        self._kept_KN = self._columns() if self._scratch is None else None

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """See `BaseProduct`."""
        if self._exact is not None:
            return self._exact.forward(x_TK, residual_TN)
        numbers_NK = self._kept_NK if self._kept_NK is not None else self._rows()
        y_TN = product(quantized(x_TK), Fp8Rows(numbers_NK, self._scale_N1), self._dtype)
        return y_TN if residual_TN is None else y_TN.add_(residual_TN)

    def backward(self, dy_TN: Tensor) -> Tensor:
        """See `BaseProduct`."""
        numbers_KN = self._kept_KN if self._kept_KN is not None else self._columns()
        return product(quantized(dy_TN), Fp8Rows(numbers_KN, self._scale_K1), self._dtype)

    def kept(self) -> Tensor | None:
        """See `BaseProduct`: in the compute dtype where that is the forward's."""
        return None if self._exact is None else self._exact.kept()

    def _rows(self) -> Tensor:
        numbers_NK = (self._scratch or Scratch()).matrix(*self._size, torch.float8_e4m3fn, self._scale_N1.device)
        for weight, start, end in self._spans:
            rows_into(weight, self._scale_N1[start:end], numbers_NK[start:end])
        return numbers_NK

    def _columns(self) -> Tensor:
        numbers_KN = (self._scratch or Scratch()).matrix(*self._size[::-1], torch.float8_e4m3fn, self._scale_N1.device)
        for weight, start, end in self._spans:
            columns_into(weight, self._scale_K1, numbers_KN[:, start:end])
        return numbers_KN
