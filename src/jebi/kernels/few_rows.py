"""``x W^T`` for the few rows of decoding, W read once as it is stored: 4 bits, 8 bits, or the compute dtype.

Everything that belongs to one launch comes along: bias, an adapter's share, the gated activation, the residual. What
must be known before the product, the norm and ``x A^T``, is `normed_and_compressed`'s, one launch for all maps of one
input. Which maps lie in one weight, and when, is the caller's.

Shapes: M rows of ``x``, at most 16; K inputs, N outputs of all maps, R ranks of all adapters, F width of gate and up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jebi.kernels.dequantize import PackedWeight, tables_on
from jebi.kernels.glu import Activation, glu
from jebi.kernels.low_rank import LowRank, added
from jebi.kernels.rms_norm import rms_norm, rms_norm_forward
from jebi.quant import dynamic8
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from jebi.kernels.gpu.few_rows import Stored

MOST = 16
"""Rows of ``x`` that are few."""

_BLOCK = 64
"""Values under one scale, as the kernels know it."""

ACTIVATIONS: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""As the kernels number them."""


@dataclass(frozen=True)
class NF4Stack:
    """NF4 maps of one input below each other; scales and their meaning are `quant.nf4`'s."""

    packed: Tensor
    """uint8, two levels a byte."""
    absmax: Tensor
    """One a block of 64 values: uint8 where double quantised, else float32."""
    nested_absmax: Tensor | None
    """float32, one a block of 256 of those."""
    offsets: Tensor | None
    """float32, likewise one a block of 256: each map has its own."""
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K)."""
        scales = self.absmax
        if self.nested_absmax is not None and self.offsets is not None:
            offsets = self.offsets.repeat_interleave(dynamic8.BLOCK)[: scales.numel()]
            scales = dynamic8.dequantize(scales, self.nested_absmax) + offsets
        return NF4Weight(self.packed, scales, None, None, shape=self.shape, dtype=dtype).dense(dtype)


Weight = Tensor | Int8Weight | NF4Stack
"""(N, K)."""

NormForm = tuple[Tensor, float, bool]
"""Weight (K,), eps and unit_offset, as `rms_norm` takes them."""


def stacked(weights: Sequence[Tensor | PackedWeight]) -> Weight | None:
    """Maps of one input below each other, as `product` takes them; None where they are none of its forms.

    All of one kind; quantised ones in blocks of 64 that begin with each row; dense ones contiguous, K a multiple of 8.
    Of several maps the bytes are laid together anew, and the maps' own become parts of that, so that nothing is held
    twice. Doubly quantised scales whose maps do not begin with a block of 256 are decoded (0.4 bits a value more).
    """
    quantised = [weight for weight in weights if not isinstance(weight, Tensor)]
    columns = weights[0].shape[1]
    if any(weight.block != _BLOCK for weight in quantised) or columns % (_BLOCK if quantised else 8):
        return None
    shape = (sum(weight.shape[0] for weight in weights), columns)
    if nf4 := [weight for weight in weights if isinstance(weight, NF4Weight)]:
        return _nf4_stack(nf4, shape) if len(nf4) == len(weights) else None
    if int8 := [weight for weight in weights if isinstance(weight, Int8Weight)]:
        if len(int8) != len(weights):
            return None
        codes, scales = (_laid([getattr(weight, name) for weight in int8]) for name in ("codes", "scales"))
        for weight, part, scale in zip(int8, *(_parts(x, int8) for x in (codes, scales))):
            weight.codes, weight.scales = part, scale
        return Int8Weight(codes, scales, shape=shape, dtype=int8[0].dtype)
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if any(weight.dtype != dense[0].dtype or not weight.is_contiguous() for weight in dense):
        return None
    whole = _laid([weight.detach() for weight in dense])
    for weight, part in zip(dense, whole.split([weight.shape[0] for weight in dense])):
        if isinstance(weight, nn.Parameter):
            weight.data = part
    return whole


def _nf4_stack(weights: list[NF4Weight], shape: tuple[int, int]) -> NF4Stack:
    packed = _laid([weight.packed for weight in weights])
    for weight, part in zip(weights, _parts(packed, weights)):
        weight.packed = part
    unit = _BLOCK * dynamic8.BLOCK
    whole = all(weight.shape[0] * weight.shape[1] % unit == 0 for weight in weights[:-1])
    nested = [weight.nested_absmax for weight in weights if weight.nested_absmax is not None]
    if len(nested) != len(weights) or not whole:
        return NF4Stack(packed, _laid([weight.scales() for weight in weights]), None, None, shape)
    absmax, nested_absmax = _laid([weight.absmax for weight in weights]), _laid(nested)
    offsets = []
    for weight, part, coarse in zip(weights, _parts(absmax, weights), _parts(nested_absmax, weights)):
        weight.absmax, weight.nested_absmax = part, coarse
        assert weight.offset is not None
        offsets.append(weight.offset.expand(coarse.numel()))
    return NF4Stack(packed, absmax, nested_absmax, torch.cat(offsets), shape)


def _laid(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(whole: Tensor, weights: Sequence[PackedWeight]) -> list[Tensor]:
    """What of ``whole`` is each weight's, by their shares of all values; the last has what is begun."""
    values = list(accumulate((weight.shape[0] * weight.shape[1] for weight in weights), initial=0))
    ends = [end * whole.numel() // values[-1] for end in values[:-1]] + [whole.numel()]
    return [whole[start:end] for start, end in pairwise(ends)]


def product(
    x_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    thin: LowRank | None = None,
    activation: Activation | None = None,
    scale: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + thin``, or of that as gate beside up ``act(gate) * up * scale``; then ``+ residual``.

    On a card sums are float32 and rounded once, but gate and up and the activation where transformers rounds.

    Args:
        x_MK: at most `MOST` rows.
        weight: from `stacked`.
        bias_N: of all maps.
        thin: an adapter's share, (M, R) and (R, N), the latter a transposed contiguous matrix.
        activation: the weight is gate (F, K) above up.
        scale: a factor on the gated product.
        residual: of the output's shape.

    Returns:
        (M, N), or with an activation (M, F), in the dtype of ``x``.
    """
    if not x_MK.is_cuda:
        return product_reference(x_MK, weight, bias_N, thin, activation, scale, residual)
    from jebi.kernels.gpu import few_rows as gpu

    stored = as_stored(weight)
    left, right = (thin.left_TR, thin.right_RF.t()) if thin is not None else (None, None)
    after = gpu.Epilogue(bias_N, left, right, None if activation is None else ACTIVATIONS[activation], scale, residual)
    outputs = weight.shape[0] // (1 if activation is None else 2)
    out = torch.empty(x_MK.shape[0], outputs, dtype=x_MK.dtype, device=x_MK.device)
    gpu.product(x_MK, stored, after, out)
    return out


def as_stored(weight: Weight) -> "Stored":
    """The weight as the kernels take it."""
    from jebi.kernels.gpu import few_rows as gpu

    if isinstance(weight, Tensor):
        return gpu.Stored(gpu.DENSE, weight, weight, None, None, None, (weight.shape[0], weight.shape[1]))
    if isinstance(weight, Int8Weight):
        return gpu.Stored(gpu.INT8, weight.codes, weight.scales, None, None, None, weight.shape)
    words, tables = weight.packed.view(torch.int32), tables_on(weight.packed.device)
    return gpu.Stored(gpu.NF4, words, weight.absmax, weight.nested_absmax, weight.offsets, tables, weight.shape)


def product_reference(
    x_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    thin: LowRank | None = None,
    activation: Activation | None = None,
    scale: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """`product` in plain torch, by the dense weight."""
    y_MN = x_MK @ (weight.to(x_MK.dtype) if isinstance(weight, Tensor) else weight.dense(x_MK.dtype)).t()
    y_MN = added(y_MN if bias_N is None else y_MN + bias_N, thin)
    if activation is not None:
        gate_MF, up_MF = y_MN.chunk(2, dim=1)
        y_MN = glu(gate_MF, up_MF, activation, scale)
    return y_MN if residual is None else y_MN + residual


def normed_and_compressed(x_MK: Tensor, norm: NormForm | None, down_RK: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a product needs of its input: the normed rows and ``normed A^T`` (M, R), in one launch.

    Args:
        x_MK: the rows.
        norm: what the rows go through; None leaves them as they are.
        down_RK: A of all maps; None where there are no adapters.
    """
    if x_MK.is_cuda and down_RK is not None:
        from jebi.kernels.gpu import few_rows_before as gpu

        return gpu.normed_and_compressed(x_MK, norm, down_RK)
    if x_MK.is_cuda and norm is not None:
        return rms_norm_forward(x_MK, *norm)[0], None
    return normed_and_compressed_reference(x_MK, norm, down_RK)


def normed_and_compressed_reference(
    x_MK: Tensor, norm: NormForm | None, down_RK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`normed_and_compressed` in plain torch."""
    x_MK = x_MK if norm is None else rms_norm(x_MK, *norm)
    return x_MK, x_MK @ down_RK.t() if down_RK is not None else None
