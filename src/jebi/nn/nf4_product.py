"""The base of a group that answers on a CPU: a few rows multiply 4 bits as they are stored, more the dense weight.

Shapes: T tokens, K inputs, N outputs of all maps.
"""

from torch import Tensor

from jebi.kernels import nf4_on_cpu
from jebi.nn.base_product import DenseProduct
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Linear


class NF4Product:
    """`DenseProduct`, but for few rows."""

    def __init__(self, few: nf4_on_cpu.Product, dense: DenseProduct):
        """``few`` takes up to `nf4_on_cpu.MOST` rows, ``dense`` all else."""
        self._few, self._dense = few, dense

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None) -> Tensor:
        """See `BaseProduct`."""
        if x_TK.shape[0] > nf4_on_cpu.MOST:
            return self._dense.forward(x_TK, residual_TN)
        y_TN = self._few(x_TK)
        return y_TN if residual_TN is None else y_TN.add_(residual_TN)

    def backward(self, dy_TN: Tensor) -> Tensor:
        """See `BaseProduct`."""
        return self._dense.backward(dy_TN)

    def kept(self) -> Tensor | None:
        """See `BaseProduct`."""
        return self._dense.kept()


def answering(maps: list[Linear], dense: DenseProduct) -> NF4Product | DenseProduct:
    """What answers with these maps: ``dense`` itself where there is no kernel for their 4 bits."""
    weights = [linear.weight for linear in maps if not isinstance(linear.weight, HostWeight)]
    few = nf4_on_cpu.product_of(weights, maps[0].dtype)
    return dense if few is None else NF4Product(few, dense)
