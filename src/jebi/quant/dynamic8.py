"""The 8-bit "dynamic tree" number format and its block-wise quantiser, in plain torch for any device.

A value is stored as the index (one byte) of the nearest of 256 code values, after division by the largest
magnitude of its block. Facts from "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861) and
"8-Bit Approximations for Parallelism in Deep Learning" (arXiv:1511.04561); the bytes are those of
bitsandbytes 0.50 on CPU, whose rounding was measured and is described at ``quantize``.

What is quantised with it is others' business: ``quant.nf4`` stores scales, ``kernels.adamw8bit`` moments.

Shape suffixes: B blocks, K values of one block, C the 256 codes, G the 65536 points of the rounding grid.
"""

from functools import lru_cache

import torch
from torch import Tensor

from jebi.config.limits import DYNAMIC_BLOCK

BLOCK = DYNAMIC_BLOCK
_EXPONENTS = 7
_GRID = 65535  # intervals of the rounding grid over [-1, 1]


def dynamic_code(signed: bool) -> Tensor:
    """Return the 256 code values in rising order: float32, on CPU, within [-1, 1] or [0, 1].

    Each of seven decades ``10**(e - 6)`` holds ``2**e`` evenly spaced values (twice as many when unsigned),
    each in the middle of its part of [0.1, 1]; each value also with a minus sign when ``signed``; then 0 and
    1 (arXiv:1511.04561, section 2.3; arXiv:2110.02861, figure 2).
    """
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float32, device="cpu")
        decade = (10.0 ** (exponent - _EXPONENTS + 1) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += decade
        if signed:
            values += [-value for value in decade]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def quantize(values: Tensor, *, signed: bool = True, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise ``values`` in consecutive blocks of ``block`` values; a last, shorter block is allowed.

    Returns ``(codes, absmax)``: uint8 of the shape of ``values``, and float32 of one value a block. Takes any
    floating dtype; the arithmetic is float32.

    The rule of bitsandbytes on CPU: ``x * (1 / absmax)``, clamped to [-1, 1], goes to the nearest of 65536
    evenly spaced grid points, ties upwards, and from there to the code nearest to that grid point. So codes
    closer together than the grid (magnitudes under about 2e-5) are told apart only by the grid: a zero
    becomes the code nearest to 1.5e-5. bitsandbytes' CUDA kernel has no grid: there zeros stay zeros and one
    of 650 other bytes is another; this function gives the same bytes on every device.
    A block of zeros has absmax 0 and codes 0. A NaN makes its block's absmax NaN.
    """
    flat = values.reshape(-1).float()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    absmax_B = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    table_G = _nearest_code(signed, flat.device)
    whole = flat.numel() // block
    edge = whole * block
    if whole:
        _quantize_rows(flat[:edge].view(-1, block), table_G, codes[:edge], absmax_B[:whole])
    if edge < flat.numel():
        _quantize_rows(flat[edge:].view(1, -1), table_G, codes[edge:], absmax_B[whole:])
    return codes.view(values.shape), absmax_B


def dequantize(codes: Tensor, absmax: Tensor, *, signed: bool = True, block: int = BLOCK) -> Tensor:
    """Return ``code value * absmax of its block``: float32 of the shape of ``codes`` (uint8)."""
    flat = codes.reshape(-1)
    out = torch.index_select(code_on(signed, flat.device), 0, flat.to(torch.int32))
    whole = flat.numel() // block
    edge = whole * block
    out[:edge].view(-1, block).mul_(absmax[:whole, None])
    if edge < flat.numel():
        out[edge:].mul_(absmax[whole])
    return out.view(codes.shape)


@lru_cache(maxsize=16)
def code_on(signed: bool, device: torch.device) -> Tensor:
    """Return ``dynamic_code(signed)`` on ``device``: one tensor for all callers, never to be written to."""
    return dynamic_code(signed).to(device)


def tables_on(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 codes and, for each of the 65536 grid points, the nearest one's index; never to be written to."""
    return code_on(signed, device), _nearest_code(signed, device)


def _quantize_rows(values_BK: Tensor, table_G: Tensor, codes_out: Tensor, absmax_out_B: Tensor) -> None:
    torch.amax(values_BK.abs(), dim=1, out=absmax_out_B)
    scaled = values_BK * absmax_out_B.reciprocal()[:, None]
    # 0 * (1 / 0) is NaN in a block of zeros; NaN has to become grid point 0, not an arbitrary integer.
    scaled = scaled.nan_to_num_(nan=-1.0).clamp_(-1.0, 1.0)
    grid = scaled.add_(1.0).mul_(_GRID / 2).add_(0.5).to(torch.int32)
    torch.index_select(table_G, 0, grid.view(-1), out=codes_out)


@lru_cache(maxsize=16)
def _nearest_code(signed: bool, device: torch.device) -> Tensor:
    """Return for each of the 65536 grid points the index of the nearest code: uint8."""
    code_C = dynamic_code(signed)
    points_G = torch.arange(_GRID + 1, dtype=torch.float32, device="cpu") * (2.0 / _GRID) - 1.0
    middles = (code_C[:-1] + code_C[1:]) / 2
    return torch.bucketize(points_G, middles).to(torch.uint8).to(device)
