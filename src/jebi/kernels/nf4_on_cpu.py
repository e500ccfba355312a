"""``x W^T`` on a CPU for the few rows of decoding, W read once as its 4 bits: bitsandbytes' kernel for AVX512-BF16.

Nothing of torch's reads NF4, and bitsandbytes is not among what jebi needs: where it is not installed, or the CPU lacks
the instructions, there is no such product, and the caller multiplies by the dense weight.

Whatever the dtype of ``x``, the kernel rounds it, levels and scales to bfloat16 and adds up in float32; rows are
computed each by itself, so that one gives the same alone and among others. `product_reference` is the exact product.

Shapes: M rows of ``x``, K inputs, N outputs of all maps.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from jebi.kernels.dequantize import PackedWeight
from jebi.quant.nf4 import NF4Weight, to_bitsandbytes

MOST = 16
"""Rows of ``x`` for which it beats the dense product in bfloat16: 4 times at one row, 1.5 at 16, none at 32 (Zen 4)."""

_BLOCK, _TILE = 64, 32
"""Columns and rows that the kernel takes at a time; a scale is that of 64 values, as NF4 comes nearly always."""

Product = Callable[[Tensor], Tensor]
"""``x`` (M, K) -> (M, N) in the dtype of ``x``, a new tensor."""


@cache
def available() -> bool:
    """Whether the kernel is here; imports bitsandbytes where the CPU could run it."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    # At its import bitsandbytes advises to install a package with yet another kernel.
    advice = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = advice.level
    advice.setLevel(logging.ERROR)
    try:
        from bitsandbytes.functional import has_avx512bf16
    except ImportError:  # not installed, or older than its kernel for CPUs
        return False
    finally:
        advice.setLevel(level)
    return bool(has_avx512bf16())


def product_of(weights: Sequence[Tensor | PackedWeight], dtype: torch.dtype) -> Product | None:
    """The product with maps of one input below each other, for at most `MOST` rows that need no gradient.

    None where the kernel is not, or where it does not serve: other weights than NF4 in blocks of 64 that begin with
    each row, N no multiple of 32, another dtype than float32 and bfloat16. The bytes are laid out anew, beside the
    maps' own: 0.53 bytes a value.
    """
    nf4 = [weight for weight in weights if isinstance(weight, NF4Weight) and weight.packed.device.type == "cpu"]
    rows, columns = sum(weight.shape[0] for weight in nf4), weights[0].shape[1]
    fits = all(weight.block == _BLOCK for weight in nf4) and columns % _BLOCK == 0 and rows % _TILE == 0
    if len(nf4) < len(weights) or not fits or dtype not in (torch.float32, torch.bfloat16) or not available():
        return None
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    packed, scales = torch.cat([weight.packed for weight in nf4]), torch.cat([weight.scales() for weight in nf4])
    stored = to_bitsandbytes(NF4Weight(packed, scales, None, None, shape=(rows, columns), dtype=dtype))
    linear = Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta").eval()
    linear.weight = Params4bit.from_prequantized(stored.pop("weight"), stored, device="cpu", module=linear)
    linear(torch.zeros(1, columns, dtype=dtype))  # lays the bytes out for the CPU
    return linear


def product_reference(x_MK: Tensor, weights: Sequence[NF4Weight]) -> Tensor:
    """The product in plain torch, by the dense weight in the dtype of ``x``."""
    return x_MK @ torch.cat([weight.dense(x_MK.dtype) for weight in weights]).t()
