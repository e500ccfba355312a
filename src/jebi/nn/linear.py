"""A linear map, stored dense or quantised, with at most one adapter.

Weights are named as in Hugging Face checkpoints (``weight``, ``bias``). They are frozen in the compute dtype, or
trained: float32 master weights then, cast where they are used. Two ways through the map: `Linear.forward`, which
autograd differentiates, and `project` / `project_backward`, which a hand-written layer calls.

Shapes: T tokens, K inputs, N outputs, r rank, R rank with an adapter's frozen half.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jebi.nn import dora
from jebi.nn.lora import Lora
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

PackedWeight = NF4Weight | Int8Weight
"""A weight that is not stored dense: a module with ``dense(dtype)``."""


class Linear(nn.Module):
    """``x W^T + b``; an adapter, when there is one, is added to it."""

    weight: nn.Parameter | PackedWeight
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
        self._kept_NK: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight (N, K) in the compute dtype: itself, the kept copy, or dequantised into a new tensor."""
        if isinstance(self.weight, nn.Parameter):
            return self.weight.to(self.dtype)
        return self._kept_NK if self._kept_NK is not None else self.weight.dense(self.dtype)

    def store(self, weight: nn.Parameter | PackedWeight) -> None:
        """Take the checkpoint's weight, in whichever form it is to be held."""
        del self.weight
        self.weight = weight
        if self.lora is not None:
            self.lora.base_squares_N = None

    def keep_for_decoding(self, dense: bool) -> None:
        """Keep what decoding reads once a token: the adapter's matrices cast; if ``dense``, the weight dequantised."""
        if dense and not isinstance(self.weight, nn.Parameter):
            self._kept_NK = self.weight.dense(self.dtype)
        for lora in self._adapters():
            lora.keep_cast(self.dtype, dora.gain(lora, self.dense()) if lora.magnitude_N is not None else None)

    def drop_kept(self) -> None:
        """Drop the copies that `keep_for_decoding` made."""
        self._kept_NK = None
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
        return x_TK @ self.dense().t()

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


def project_backward(
    linear: Linear, dy_TN: Tensor, x_TK: Tensor, xa_TR: Tensor | None, grads: Grads, dx_TK: Tensor | None
) -> Tensor:
    """Backward of `project`: fills ``grads`` for everything trained and returns ``dx``.

    Args:
        linear: the map.
        dy_TN: gradient of its output.
        x_TK: its input.
        xa_TR: what `project` returned beside the output.
        grads: filled in.
        dx_TK: a gradient to add to, in place, when the input feeds several maps; None starts a new one.
    """
    weight_NK = linear.dense()
    dy_TN = _outer_backward(linear, weight_NK, dy_TN, x_TK, xa_TR, grads)
    dx_TK = dy_TN @ weight_NK if dx_TK is None else dx_TK.addmm_(dy_TN, weight_NK)
    _inner_backward(linear, dy_TN, x_TK, xa_TR, grads, dx_TK)
    return dx_TK


def adapter_backward(
    linear: Linear, dy_TN: Tensor, x_TK: Tensor, xa_TR: Tensor | None, grads: Grads, dx_TK: Tensor | None
) -> None:
    """The trained part of `project_backward`; adds the adapter's share to ``dx_TK`` where one is wanted."""
    dy_TN = _outer_backward(linear, None, dy_TN, x_TK, xa_TR, grads)
    _inner_backward(linear, dy_TN, x_TK, xa_TR, grads, dx_TK)


def _unscaled(lora: Lora, weight_NK: Tensor, x_TK: Tensor, xa_TR: Tensor) -> Tensor:
    """What DoRA's gain multiplies (T, N)."""
    return (x_TK @ weight_NK.t()).addmm_(xa_TR, lora.up(x_TK.dtype).t())


def _outer_backward(
    linear: Linear, weight_NK: Tensor | None, dy_TN: Tensor, x_TK: Tensor, xa_TR: Tensor | None, grads: Grads
) -> Tensor:
    """Gradients of the bias and of DoRA's lengths; returns the gradient of the products within.

    The products are made again for the lengths: keeping them would cost as much memory as the outputs.
    """
    if linear.bias is not None and linear.bias.requires_grad:
        grads[linear.bias] = dy_TN.sum(0, dtype=torch.float32)
    lora = linear.adapter
    if lora is None or lora.magnitude_N is None:
        return dy_TN
    assert xa_TR is not None
    weight_NK = linear.dense() if weight_NK is None else weight_NK
    lengths_N = dora.row_lengths(lora, weight_NK)
    unscaled_TN = _unscaled(lora, weight_NK, x_TK, xa_TR)
    grads[lora.magnitude_N] = unscaled_TN.mul_(dy_TN).sum(0, dtype=torch.float32).div_(lengths_N)
    return dy_TN * (lora.magnitude_N / lengths_N).to(dy_TN.dtype)


def _inner_backward(
    linear: Linear, dy_TN: Tensor, x_TK: Tensor, xa_TR: Tensor | None, grads: Grads, dx_TK: Tensor | None
) -> None:
    """Gradients of a trained weight and of the adapter's matrices; adds the adapter's share to ``dx_TK``."""
    if isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad:
        grads[linear.weight] = (dy_TN.t() @ x_TK).float()
    lora = linear.adapter
    if lora is None or xa_TR is None:
        return
    rank = lora.A_rK.shape[0]
    dxa_TR = dy_TN @ lora.up(dy_TN.dtype)
    grads[lora.B_Nr] = (dy_TN.t() @ xa_TR[:, :rank]).float().mul_(lora.scale)
    grads[lora.A_rK] = (dxa_TR[:, :rank].t() @ x_TK).float()
    if dx_TK is not None:
        dx_TK.addmm_(dxa_TR, lora.down(dy_TN.dtype))
