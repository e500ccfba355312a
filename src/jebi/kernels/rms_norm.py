"""Root-mean-square norm (arXiv:1910.07467): reference, forward that keeps its statistics, backward.

The residual add and the choice of where the output goes are the layer's.

Shapes: T tokens, D width. Statistics are float32 whatever the input is. With ``unit_offset`` the weight is stored
less one, and the product with it is taken in float32 before rounding (Gemma); without it, after (Llama).
"""

from typing import Any

import torch
from torch import Tensor

from jebi.kernels.low_rank import product32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """Reference, differentiable: ``weight * (x / rms(x))`` over the last dimension, rounded as transformers rounds.

    Args:
        x: (..., D), any float dtype; the norm is taken in float32.
        weight_D: (D,), any float dtype.
        eps: added to the mean square.
        unit_offset: the weight is ``1 + weight_D``.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (normed * (1 + weight_D.float())).to(x.dtype)
    return weight_D.to(x.dtype) * normed.to(x.dtype)


def rms_norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float, unit_offset: bool = False) -> tuple[Tensor, Tensor]:
    """Return the normed tokens (..., T, D) and ``1 / rms`` (..., T, 1) in float32, which the backward needs.

    Args:
        x_TD: (..., T, D).
        weight_D: (D,).
        eps: added to the mean square.
        unit_offset: the weight is ``1 + weight_D``.
    """
    if x_TD.is_cuda:
        from jebi.kernels.gpu import rms_norm as gpu

        y, rstd = gpu.forward(x_TD.reshape(-1, x_TD.shape[-1]), weight_D, eps, unit_offset)
        return y.view(*x_TD.shape[:-1], -1), rstd.view(*x_TD.shape[:-1], 1)
    x32_TD = x_TD.float()
    rstd_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).pow_(2).div_(x_TD.shape[-1])
    rstd_T1 = rstd_T1.add_(eps).rsqrt_()
    normed_TD = x32_TD * rstd_T1
    if unit_offset:
        return normed_TD.mul_(1 + weight_D.float()).to(x_TD.dtype), rstd_T1
    return normed_TD.to(x_TD.dtype).mul_(weight_D), rstd_T1


def rms_norm_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    rstd_T1: Tensor,
    weight_D: Tensor,
    unit_offset: bool = False,
    residual_TD: Tensor | None = None,
    out_TD: Tensor | None = None,
) -> Tensor:
    """Gradient of the input (..., T, D), in the input's dtype; ``residual_TD``, another part of it, is added.

    It is written into ``out_TD`` (T, D), contiguous, where that is given; it may be the residual itself.

    With ``n = x * rstd`` and ``g = dy * weight``: ``dx = rstd * (g - n * mean(g * n))``.
    """
    if x_TD.is_cuda:
        from jebi.kernels.gpu import rms_norm as gpu

        dy_TD, flat_TD = (tensor.reshape(-1, x_TD.shape[-1]) for tensor in (dy_TD, x_TD))
        return gpu.backward(dy_TD, flat_TD, rstd_T1, weight_D, unit_offset, residual_TD, out_TD).view(x_TD.shape)
    normed_TD = x_TD.float() * rstd_T1
    g_TD = dy_TD.float() * (weight_D.float() + 1 if unit_offset else weight_D.float())
    mean_T1 = (g_TD * normed_TD).mean(-1, keepdim=True)
    dx_TD = g_TD.sub_(normed_TD.mul_(mean_T1)).mul_(rstd_T1).to(x_TD.dtype)
    dx_TD = dx_TD if residual_TD is None else dx_TD.add_(residual_TD)
    return dx_TD if out_TD is None else out_TD.copy_(dx_TD)


def rms_norm_weight_grad(dy_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor) -> Tensor:
    """Gradient of a trained weight (D,) in float32: the sum of ``dy * n`` over all tokens."""
    return (x_TD.float() * rstd_T1).mul_(dy_TD).flatten(0, -2).sum(0)


def rms_norm_summed(
    left_TR: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, unit_offset: bool = False
) -> Tensor:
    """``left^T y`` (R, D) in float32 of normed tokens ``y`` (T, D), which are not made.

    A norm's factors are one a row, which goes into ``left``, and one a column, which goes behind the sum.
    """
    scaled_TR = (left_TR.float() * rstd_T1).to(left_TR.dtype)
    return product32(scaled_TR.t(), x_TD).mul_(weight_D.float() + 1 if unit_offset else weight_D.float())


def rms_norm_lean(x: Tensor, weight_D: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """`rms_norm` with a backward that keeps only its input and statistics, where autograd keeps float32 copies."""
    out: Tensor = _RMSNorm.apply(x, weight_D, eps, unit_offset)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, unit_offset: bool) -> Tensor:
        y, rstd = rms_norm_forward(x, weight_D, eps, unit_offset)
        ctx.unit_offset = unit_offset
        ctx.save_for_backward(x, rstd, weight_D)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, rstd, weight_D = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = rms_norm_backward(dy, x, rstd, weight_D, ctx.unit_offset) if ctx.needs_input_grad[0] else None
        dweight_D = rms_norm_weight_grad(dy, x, rstd).to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight_D, None, None
