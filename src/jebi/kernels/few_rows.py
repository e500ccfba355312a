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
from jebi.kernels.rms_norm import rms_norm
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from jebi.kernels.gpu.few_rows import Stored
    from jebi.kernels.gpu.few_rows_before import Laid

MOST = 16
"""Rows of ``x`` that are few."""

_FEW = 4
"""Rows that take no longer to be read as they come."""

_BLOCK = 64
"""Values under one scale, as the kernels know it."""

ACTIVATIONS: dict[str, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""As the kernels number them."""


@dataclass(frozen=True)
class Stack:
    """Quantised maps of one input below each other, in blocks of 64 that begin with each row."""

    codes: Tensor
    """int8, or uint8 with two levels of NF4 a byte."""
    scales_BN: Tensor
    """float32, a block's of all rows side by side: those that threads read at once."""
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K)."""
        scales = self.scales_BN.t().reshape(-1)
        if self.codes.dtype == torch.int8:
            return Int8Weight(self.codes, scales, shape=self.shape, dtype=dtype).dense(dtype)
        return NF4Weight(self.codes, scales, None, None, shape=self.shape, dtype=dtype).dense(dtype)


Weight = Tensor | Stack
"""(N, K)."""

NormForm = tuple[Tensor, float, bool]
"""Weight (K,), eps and unit_offset, as `rms_norm` takes them."""


def stacked(weights: Sequence[Tensor | PackedWeight]) -> Weight | None:
    """Maps of one input below each other, as `product` takes them; None where they are none of its forms.

    All of one kind; quantised ones in blocks of 64 that begin with each row; dense ones contiguous, K a multiple of 8.
    Of several maps the bytes are laid together anew, and the maps' own become parts of that, so that nothing is held
    twice but scales: they are decoded and turned, half a bit a value.
    """
    quantised = [weight for weight in weights if not isinstance(weight, Tensor)]
    columns = weights[0].shape[1]
    if any(weight.block != _BLOCK for weight in quantised) or columns % (_BLOCK if quantised else 8):
        return None
    shape = (sum(weight.shape[0] for weight in weights), columns)
    if nf4 := [weight for weight in weights if isinstance(weight, NF4Weight)]:
        if len(nf4) != len(weights):
            return None
        codes = _laid([weight.packed for weight in nf4])
        for weight, part in zip(nf4, _parts(codes, nf4)):
            weight.packed = part
        return Stack(codes, _turned([weight.scales() for weight in nf4], columns), shape)
    if int8 := [weight for weight in weights if isinstance(weight, Int8Weight)]:
        if len(int8) != len(weights):
            return None
        codes = _laid([weight.codes for weight in int8])
        for integers, part in zip(int8, _parts(codes, int8)):
            integers.codes = part
        return Stack(codes, _turned([weight.scales for weight in int8], columns), shape)
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if any(weight.dtype != dense[0].dtype or not weight.is_contiguous() for weight in dense):
        return None
    whole = _laid([weight.detach() for weight in dense])
    for matrix, part in zip(dense, whole.split([matrix.shape[0] for matrix in dense])):
        if isinstance(matrix, nn.Parameter):
            matrix.data = part
    return whole


def _turned(scales: list[Tensor], columns: int) -> Tensor:
    return torch.cat([part.view(-1, columns // _BLOCK) for part in scales]).t().contiguous()


def _laid(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(whole: Tensor, weights: Sequence[PackedWeight]) -> list[Tensor]:
    """What of ``whole`` is each weight's, by their shares of all values; the last has what is begun."""
    values = list(accumulate((weight.shape[0] * weight.shape[1] for weight in weights), initial=0))
    ends = [end * whole.numel() // values[-1] for end in values[:-1]] + [whole.numel()]
    return [whole[start:end] for start, end in pairwise(ends)]


def product(
    x: "Tensor | Laid",
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
        x: (M, K), at most `MOST` rows, or what `normed_and_compressed` made of them.
        weight: from `stacked`.
        bias_N: of all maps.
        thin: an adapter's share, (M, R) and (R, N), the latter a transposed contiguous matrix.
        activation: the weight is gate (F, K) above up.
        scale: a factor on the gated product.
        residual: of the output's shape.

    Returns:
        (M, N), or with an activation (M, F), in the dtype of ``x``.
    """
    if isinstance(x, Tensor) and not x.is_cuda:
        return product_reference(x, weight, bias_N, thin, activation, scale, residual)
    from jebi.kernels.gpu import few_rows as gpu
    from jebi.kernels.gpu.few_rows_epilogue import Epilogue

    stored = as_stored(weight)
    left, right = (thin.left_TR, thin.right_RF.t()) if thin is not None else (None, None)
    after = Epilogue(bias_N, left, right, None if activation is None else ACTIVATIONS[activation], scale, residual)
    tokens, values = (x.shape[0], x) if isinstance(x, Tensor) else (x.tokens, x.values)
    outputs = weight.shape[0] // (1 if activation is None else 2)
    out = torch.empty(tokens, outputs, dtype=values.dtype, device=values.device)
    gpu.product(x, stored, after, out)
    return out


def as_stored(weight: Weight) -> "Stored":
    """The weight as the kernels take it."""
    from jebi.kernels.gpu import few_rows as gpu

    if isinstance(weight, Tensor):
        return gpu.Stored(gpu.DENSE, weight, weight, None, (weight.shape[0], weight.shape[1]))
    if weight.codes.dtype == torch.int8:
        return gpu.Stored(gpu.INT8, weight.codes, weight.scales_BN, None, weight.shape)
    levels = tables_on(weight.codes.device)[0]
    return gpu.Stored(gpu.NF4, weight.codes.view(torch.int32), weight.scales_BN, levels, weight.shape)


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


def normed_and_compressed(
    x_MK: Tensor, norm: NormForm | None, down_RK: Tensor | None
) -> "tuple[Tensor | Laid, Tensor | None]":
    """What a product needs of its input: the normed rows, on a card laid for it, and ``normed A^T`` (M, R); one launch.

    A few rows that nothing is done to stay as they are.

    Args:
        x_MK: the rows.
        norm: what the rows go through; None leaves them as they are.
        down_RK: A of all maps; None where there are no adapters.
    """
    # A launch of its own, to lay the rows, is worth it where there are more than a few.
    if x_MK.is_cuda and (norm is not None or down_RK is not None or x_MK.shape[0] > _FEW):
        from jebi.kernels.gpu import few_rows_before as gpu

        return gpu.normed_and_compressed(x_MK, norm, down_RK)
    return normed_and_compressed_reference(x_MK, norm, down_RK)


def normed_and_compressed_reference(
    x_MK: Tensor, norm: NormForm | None, down_RK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`normed_and_compressed` in plain torch."""
    x_MK = x_MK if norm is None else rms_norm(x_MK, *norm)
    return x_MK, x_MK @ down_RK.t() if down_RK is not None else None
