"""A linear map, stored dense or quantised, with at most one adapter.

Weights are named as in Hugging Face checkpoints (``weight``, ``bias``). They are frozen in the compute dtype, or
trained: float32 master weights then, cast where they are used. A head may also lie in host memory. Two ways through the
map: `Linear.forward`, which autograd differentiates, and `project` with `backward_input` and `backward_trained`, for a
hand-written layer.

Shapes: T tokens, K inputs, N outputs, r rank, R rank with an adapter's frozen half.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jebi.kernels import dequantize
from jebi.kernels.dequantize import PackedWeight
from jebi.kernels.low_rank import product32
from jebi.nn import dora
from jebi.nn.host_weight import HostWeight
from jebi.nn.lora import Lora


class Linear(nn.Module):
    """``x W^T + b``; an adapter, when there is one, is added to it."""

    weight: nn.Parameter | PackedWeight | HostWeight
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype):
        """Build it on the meta device: the checkpoint's tensors are put in as they arrive."""
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.dtype = dtype
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device="meta"), requires_grad=False)
        empty = torch.empty(outputs, dtype=dtype, device="meta") if bias else None
        self.bias = nn.Parameter(empty, requires_grad=False) if empty is not None else None
        self.lora: Lora | None = None
        self._kept: tuple[nn.Parameter | PackedWeight | HostWeight, Tensor] | None = None

    def dense(self) -> Tensor:
        """The weight (N, K) in the compute dtype: itself, the kept copy, or dequantised into a new tensor."""
        if self._kept is not None and self._is_kept:
            return self._kept[1]
        if isinstance(self.weight, HostWeight):
            return self.weight.dense()
        return self._cast() if isinstance(self.weight, nn.Parameter) else dequantize.dense(self.weight, self.dtype)

    def _cast(self) -> Tensor:
        assert isinstance(self.weight, nn.Parameter)
        return self.weight.to(self.dtype)

    def device(self) -> torch.device:
        """Where the weight is, or the card that it serves."""
        weight = self.weight
        return weight.device if isinstance(weight, nn.Parameter | HostWeight) else next(weight.buffers()).device

    @property
    def is_dense(self) -> bool:
        """Whether `dense` makes no matrix anew."""
        return isinstance(self.weight, nn.Parameter) or self._is_kept

    @property
    def _is_kept(self) -> bool:
        # A trained weight's copy is not its original's, which may be in its place for a while.
        return self._kept is not None and self._kept[0] is self.weight

    def store(self, weight: nn.Parameter | PackedWeight | HostWeight) -> None:
        """Take the checkpoint's weight, in whichever form it is to be held."""
        del self.weight
        self.weight = weight
        if self.lora is not None:
            self.lora.base_squares_N = None

    def keep(self, weight_NK: Tensor) -> None:
        """Keep the weight in the compute dtype, which somebody has made of it already."""
        self._kept = self.weight, weight_NK

    def keep_for_decoding(self, dense: bool) -> None:
        """Keep what decoding reads once a token: the adapter's matrices cast; if ``dense``, the weight dequantised."""
        if (
            dense
            and not self._is_kept
            and not (isinstance(self.weight, nn.Parameter) and self.weight.dtype == self.dtype)
        ):
            self.keep(self.dense().detach())
        for lora in self._adapters():
            lora.keep_cast(self.dtype, dora.gain(lora, self.dense()) if lora.magnitude_N is not None else None)

    def drop_kept(self) -> None:
        """Drop the copies that `keep_for_decoding` made."""
        self._kept = None
        for lora in self._adapters():
            lora.keep_cast(None)

    def _adapters(self) -> Iterator[Lora]:
        """The adapter and its stand-in, where there are any."""
        if self.lora is not None:
            yield self.lora
            if self.lora.stand_in is not None:
                yield self.lora.stand_in

    @property
    def adapter(self) -> Lora | None:
        """The adapter that takes part now, if any."""
        return self.lora if self.lora is None or self.lora.enabled else self.lora.stand_in

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N); differentiable by ``x`` and everything trained."""
        # Flat, since a product with a batch of matrices copies the weight for every one of them.
        x, lead = x.reshape(-1, self.in_features), x.shape[:-1]
        lora = self.adapter
        has_lengths = lora is not None and lora.magnitude_N is not None
        y = self._dora(x, lora) if lora is not None and has_lengths else self._product(x)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if lora is not None and not has_lengths:
            y = y + lora(x)
        out: Tensor = y.unflatten(0, lead)
        return out

    def _product(self, x_TK: Tensor) -> Tensor:
        """``x W^T`` (T, N), differentiable by ``x`` and a trained weight."""
        trained = isinstance(self.weight, nn.Parameter) and self.weight.requires_grad
        if x_TK.requires_grad and torch.is_grad_enabled() and not trained:
            y_TN: Tensor = _FrozenProduct.apply(x_TK, self)
            return y_TN
        return x_TK @ (self._cast() if trained else self.dense()).t()

    def _dora(self, x_TK: Tensor, lora: Lora) -> Tensor:
        """DoRA's output without the bias. As in PEFT, what its gain leaves of the base sees ``x`` without dropout."""
        gain_N = lora.kept[2] if lora.kept is not None else None
        if gain_N is None:
            gain_N = dora.gain(lora, self.dense()).to(x_TK.dtype)
        dropped_TK = lora.drop(x_TK)
        base_TN = self._product(dropped_TK)
        y_TN = gain_N * (base_TN + lora.product(dropped_TK))
        return y_TN if dropped_TK is x_TK else y_TN + self._product(x_TK) - base_TN

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, {self.dtype}"


class _FrozenProduct(torch.autograd.Function):
    """``x W^T`` that keeps nothing: a quantised weight is dequantised again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear) -> Tensor:
        ctx.linear = linear
        return x @ linear.dense().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dense(), None


def project(linear: Linear, x_TK: Tensor) -> tuple[Tensor, Tensor | None]:
    """The map with its adapter, without a graph; also ``x A^T`` (T, R), which the backward needs."""
    weight_NK, lora = linear.dense(), linear.adapter
    bias_N = linear.bias.to(x_TK.dtype) if linear.bias is not None else None
    if lora is not None and lora.magnitude_N is not None:
        xa_TR = lora.compress(x_TK)
        y_TN = _unscaled(lora, weight_NK, x_TK, xa_TR).mul_(dora.gain(lora, weight_NK).to(x_TK.dtype))
        return y_TN if bias_N is None else y_TN.add_(bias_N), xa_TR
    y_TN = x_TK @ weight_NK.t() if bias_N is None else torch.addmm(bias_N, x_TK, weight_NK.t())
    if lora is None:
        return y_TN, None
    xa_TR = lora.compress(x_TK)
    return y_TN.addmm_(xa_TR, lora.up(x_TK.dtype).t()), xa_TR


Grads = dict[nn.Parameter, Tensor]
"""Gradients of trained parameters that one layer's backward has computed."""


@dataclass
class Share:
    """What one map's backward has computed by the time its input is needed for the gradients of what is trained."""

    dy_TN: Tensor
    """Gradient of the products, within DoRA's gain where there is one."""
    dxa_TR: Tensor | None
    """Gradient of ``x A^T``."""
    lengths_N: Tensor | None
    """DoRA: the present row lengths."""


def backward_input(
    linear: Linear, dy_TN: Tensor, dx_TK: Tensor | None = None, wanted: bool = True
) -> tuple[Tensor | None, Share]:
    """First half of the backward of `project`: the gradient of the input, which itself is not needed.

    Args:
        linear: the map.
        dy_TN: gradient of its output.
        dx_TK: a gradient to add to, in place, when the input feeds several maps; None starts a new one.
        wanted: whether the input needs a gradient at all.
    """
    lora = linear.adapter
    measured = lora is not None and lora.magnitude_N is not None
    weight_NK = linear.dense() if wanted or measured else None
    lengths_N = None
    if lora is not None and lora.magnitude_N is not None:
        assert weight_NK is not None
        lengths_N = dora.row_lengths(lora, weight_NK)
        dy_TN = dy_TN * (lora.magnitude_N / lengths_N).to(dy_TN.dtype)
    dxa_TR = dy_TN @ lora.up(dy_TN.dtype) if lora is not None else None
    if wanted:
        assert weight_NK is not None
        dx_TK = dy_TN @ weight_NK if dx_TK is None else dx_TK.addmm_(dy_TN, weight_NK)
        if lora is not None and dxa_TR is not None:
            dx_TK.addmm_(dxa_TR, lora.down(dy_TN.dtype))
    return dx_TK, Share(dy_TN, dxa_TR, lengths_N)


def backward_trained(
    linear: Linear, dy_TN: Tensor, share: Share, x_TK: Tensor, xa_TR: Tensor | None, grads: Grads
) -> None:
    """Second half: fills ``grads`` for everything that is trained.

    Args:
        linear: the map.
        dy_TN: gradient of its output.
        share: what `backward_input` returned.
        x_TK: the map's input.
        xa_TR: what `project` returned beside the output.
        grads: filled in.
    """
    if linear.bias is not None and linear.bias.requires_grad:
        grads[linear.bias] = dy_TN.sum(0, dtype=torch.float32)
    if isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad:
        grads[linear.weight] = product32(share.dy_TN.t(), x_TK)
    lora = linear.adapter
    if lora is None:
        return
    assert xa_TR is not None
    assert share.dxa_TR is not None
    if lora.magnitude_N is not None:
        assert share.lengths_N is not None
        # The products are made again: keeping them would cost as much memory as the outputs.
        unscaled_TN = _unscaled(lora, linear.dense(), x_TK, xa_TR)
        grads[lora.magnitude_N] = unscaled_TN.mul_(dy_TN).sum(0, dtype=torch.float32).div_(share.lengths_N)
    rank = lora.A_rK.shape[0]
    grads[lora.B_Nr] = product32(share.dy_TN.t(), xa_TR[:, :rank]).mul_(lora.scale)
    grads[lora.A_rK] = product32(share.dxa_TR[:, :rank].t(), x_TK)


def _unscaled(lora: Lora, weight_NK: Tensor, x_TK: Tensor, xa_TR: Tensor) -> Tensor:
    """What DoRA's gain multiplies (T, N)."""
    return (x_TK @ weight_NK.t()).addmm_(xa_TR, lora.up(x_TK.dtype).t())
