"""A frozen linear map, stored dense or quantised, with at most one adapter.

Weights are named as in Hugging Face checkpoints (``weight``, ``bias``). Two ways through it: `Linear.forward`, which
autograd differentiates, and `project` / `project_backward`, which a hand-written layer calls.

Shapes: T tokens, K inputs, N outputs, r rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from jebi.nn.lora import Lora
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

PackedWeight = NF4Weight | Int8Weight
"""A weight that is not stored dense: a module with ``dense(dtype)``."""


class Linear(nn.Module):
    """``x W^T + b`` with frozen W; an adapter, when there is one, is added to it."""

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
        self.base_bias: Tensor | None
        """The checkpoint's bias, where ``bias`` is a trained copy of it."""
        self.register_buffer("base_bias", None, persistent=False)
        self.lora: Lora | None = None
        self._kept_NK: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight (N, K) in the compute dtype: itself, the kept copy, or dequantised into a new tensor."""
        if isinstance(self.weight, nn.Parameter):
            return self.weight
        return self._kept_NK if self._kept_NK is not None else self.weight.dense(self.dtype)

    def store(self, weight: nn.Parameter | PackedWeight) -> None:
        """Take the checkpoint's weight, in whichever form it is to be held."""
        del self.weight
        self.weight = weight

    def keep_for_decoding(self, dense: bool) -> None:
        """Keep what decoding reads once a token: the adapter's matrices cast; if ``dense``, the weight dequantised."""
        if dense and not isinstance(self.weight, nn.Parameter):
            self._kept_NK = self.weight.dense(self.dtype)
        if self.lora is not None:
            self.lora.keep_cast(self.dtype)

    def drop_kept(self) -> None:
        """Drop the copies that `keep_for_decoding` made."""
        self._kept_NK = None
        if self.lora is not None:
            self.lora.keep_cast(None)

    @property
    def adapter(self) -> Lora | None:
        """The adapter that takes part now, if any."""
        return self.lora if self.lora is not None and self.lora.enabled else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N); differentiable by ``x``, the bias and the adapter."""
        # Flat, since a product with a batch of matrices copies the weight for every one of them.
        x, lead = x.reshape(-1, self.in_features), x.shape[:-1]
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = _FrozenProduct.apply(x, self)
        else:
            y = x @ self.dense().t()
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.adapter is not None:
            y = y + self.adapter(x)
        out: Tensor = y.unflatten(0, lead)
        return out

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
    """``x W^T + b`` plus the adapter, without a graph; also ``x A^T`` (T, r), which the backward needs."""
    w_KN = linear.dense().t()
    y_TN = x_TK @ w_KN if linear.bias is None else torch.addmm(linear.bias.to(x_TK.dtype), x_TK, w_KN)
    lora = linear.adapter
    if lora is None:
        return y_TN, None
    xa_Tr = x_TK @ lora.A_rK.to(x_TK.dtype).t()
    return y_TN.addmm_(xa_Tr, (lora.B_Nr * lora.scale).to(x_TK.dtype).t()), xa_Tr


Grads = dict[nn.Parameter, Tensor]
"""Gradients of trained parameters that one layer's backward has computed."""


def project_backward(
    linear: Linear, dy_TN: Tensor, x_TK: Tensor, xa_Tr: Tensor | None, grads: Grads, dx_TK: Tensor | None
) -> Tensor:
    """Backward of `project`: fills ``grads`` for the adapter and a trained bias and returns ``dx``.

    Args:
        linear: the map.
        dy_TN: gradient of its output.
        x_TK: its input.
        xa_Tr: what `project` returned beside the output.
        grads: filled in.
        dx_TK: a gradient to add to, in place, when the input feeds several maps; None starts a new one.
    """
    dx_TK = dy_TN @ linear.dense() if dx_TK is None else dx_TK.addmm_(dy_TN, linear.dense())
    adapter_backward(linear, dy_TN, x_TK, xa_Tr, grads, dx_TK)
    return dx_TK


def adapter_backward(
    linear: Linear, dy_TN: Tensor, x_TK: Tensor, xa_Tr: Tensor | None, grads: Grads, dx_TK: Tensor | None
) -> None:
    """The trained part of `project_backward`; adds the adapter's share to ``dx_TK`` where one is wanted."""
    if linear.bias is not None and linear.bias.requires_grad:
        grads[linear.bias] = dy_TN.sum(0, dtype=torch.float32)
    lora = linear.adapter
    if lora is None or xa_Tr is None:
        return
    dxa_Tr = dy_TN @ (lora.B_Nr * lora.scale).to(dy_TN.dtype)
    grads[lora.B_Nr] = (dy_TN.t() @ xa_Tr).float().mul_(lora.scale)
    grads[lora.A_rK] = (dxa_Tr.t() @ x_TK).float()
    if dx_TK is not None:
        dx_TK.addmm_(dxa_Tr, lora.A_rK.to(dy_TN.dtype))
