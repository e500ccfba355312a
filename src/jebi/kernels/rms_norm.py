"""Root-mean-square norm (arXiv:1910.07467): reference, forward that keeps its statistics, backward.

The residual add and the choice of where the output goes are the layer's.

Shapes: T tokens, D width. Statistics are float32 whatever the input is. With ``unit_offset`` the weight is stored
less one, and the product with it is taken in float32 before rounding (Gemma); without it, after (Llama).
"""

import torch
from torch import Tensor


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
    """Return the normed tokens (..., T, D) and ``1 / rms`` (..., T, 1) in float32, which the backward needs."""
    x32_TD = x_TD.float()
    rstd_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).pow_(2).div_(x_TD.shape[-1])
    rstd_T1 = rstd_T1.add_(eps).rsqrt_()
    return rms_norm_apply(x_TD, rstd_T1, weight_D, unit_offset), rstd_T1


def rms_norm_apply(x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, unit_offset: bool = False) -> Tensor:
    """The normed tokens once more, from the kept statistics: cheaper to rebuild than to keep."""
    normed_TD = x_TD.float() * rstd_T1
    if unit_offset:
        return normed_TD.mul_(1 + weight_D.float()).to(x_TD.dtype)
    return normed_TD.to(x_TD.dtype).mul_(weight_D)


def rms_norm_backward(
    dy_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor, unit_offset: bool = False
) -> Tensor:
    """Gradient of the input (..., T, D), in the input's dtype.

    With ``n = x * rstd`` and ``g = dy * weight``: ``dx = rstd * (g - n * mean(g * n))``.
    """
    normed_TD = x_TD.float() * rstd_T1
    g_TD = dy_TD.float() * (weight_D.float() + 1 if unit_offset else weight_D.float())
    mean_T1 = (g_TD * normed_TD).mean(-1, keepdim=True)
    return g_TD.sub_(normed_TD.mul_(mean_T1)).mul_(rstd_T1).to(x_TD.dtype)


def rms_norm_weight_grad(dy_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor) -> Tensor:
    """Gradient of a trained weight (D,) in float32: the sum of ``dy * n`` over all tokens."""
    return (x_TD.float() * rstd_T1).mul_(dy_TD).flatten(0, -2).sum(0)
