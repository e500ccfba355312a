"""Products of two matrices in 8-bit floats, scaled by rows: on tensor cores where a card has them, else the reference.

The reference multiplies the same numbers in float32, so that a CPU computes what a card does but for the order of sums
(with ``use_fast_accum`` a card also keeps some 14 bits of each partial sum). What becomes fp8 is `nn.fp8_product`'s.

Shapes: T tokens, K inner dimension, N outputs.
"""

import torch
from torch import Tensor, nn

from jebi.kernels.dequantize import PackedWeight, dense, tables_on
from jebi.quant import fp8
from jebi.quant.fp8 import Fp8Rows
from jebi.quant.nf4 import NF4Weight

UNIT = 16
"""Both K and N are multiples of it, as ``torch._scaled_mm`` wants them."""


def served(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats that are scaled by rows: compute capability 9.0 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def quantized(x_TK: Tensor) -> Fp8Rows:
    """The rows of ``x`` in 8 bits, as `quant.fp8.quantize_rows` makes them."""
    if not served(x_TK.device):
        return fp8.quantize_rows(x_TK)
    from jebi.kernels.gpu import fp8 as gpu

    numbers_TK = torch.empty(x_TK.shape, dtype=torch.float8_e4m3fn, device=x_TK.device)
    return Fp8Rows(numbers_TK, gpu.quantize_rows(x_TK, numbers_TK))


def product(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """``x w^T`` (T, N) of ``x`` (T, K) and ``w`` (N, K)."""
    if not served(x.numbers_TK.device):
        return (x.dense() @ weight.dense().t()).to(dtype)
    return torch._scaled_mm(
        x.numbers_TK,
        weight.numbers_TK.t(),
        scale_a=x.scale_T1,
        scale_b=weight.scale_T1.view(1, -1),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def rows_into(weight: PackedWeight | nn.Parameter, scale_N1: Tensor, out_NK: Tensor) -> None:
    """A weight in 8 bits with the scales given, into ``out_NK`` (float8_e4m3fn), whose rows may be strided."""
    if not _by_kernel(weight, scale_N1, out_NK, transposed=False):
        out_NK.copy_(fp8.numbers_of(_dense32(weight), scale_N1))


def columns_into(weight: PackedWeight | nn.Parameter, scale_K1: Tensor, out_KN: Tensor) -> None:
    """The transpose of a weight (N, K) with scales a column of it, into ``out_KN``, whose rows may be strided."""
    if not _by_kernel(weight, scale_K1, out_KN, transposed=True):
        out_KN.copy_(fp8.numbers_of(_dense32(weight), scale_K1.t()).t())


def largest(weight: PackedWeight | nn.Parameter) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of a weight's rows (N, 1) and columns (K, 1), in float32."""
    magnitude_NK = _dense32(weight).abs_()
    return magnitude_NK.amax(1)[:, None], magnitude_NK.amax(0)[:, None]


def _dense32(weight: PackedWeight | nn.Parameter) -> Tensor:
    """A new tensor, so that numbers are rounded once, whatever the compute dtype is."""
    if isinstance(weight, nn.Parameter):
        return weight.detach().to(torch.float32, copy=True)
    return dense(weight, torch.float32)


def _by_kernel(weight: PackedWeight | nn.Parameter, scale: Tensor, out: Tensor, transposed: bool) -> bool:
    """Write the weight where the kernel serves: NF4 as `quant.nf4` makes it, each row a whole number of blocks."""
    if not isinstance(weight, NF4Weight) or weight.block != 64 or weight.shape[1] % 64 or not served(out.device):
        return False
    if weight.nested_absmax is None or weight.offset is None:
        return False
    from jebi.kernels.gpu import fp8 as gpu

    stored = weight.packed, weight.absmax, weight.nested_absmax, weight.offset, *tables_on(out.device)
    gpu.from_nf4(stored, weight.shape, scale, out, transposed)
    return True
