"""Root-mean-square norm (arXiv:1910.07467): reference, forward that keeps its statistics, backward.

The residual add and the choice of where the output goes are the layer's.

Shapes: T tokens, D width. Statistics are float32 whatever the input is.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Reference, differentiable: ``weight * (x / rms(x))`` over the last dimension, rounded as transformers rounds.

    Args:
        x: (..., D), any float dtype; the norm is taken in float32 and rounded to this dtype before the weight.
        weight_D: (D,) of the same dtype.
        eps: added to the mean square.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * normed.to(x.dtype)


def rms_norm_forward(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normed tokens (T, D) and ``1 / rms`` (T, 1) in float32, which the backward needs."""
    x32_TD = x_TD.float()
    rstd_T1 = torch.linalg.vector_norm(x32_TD, dim=-1, keepdim=True).pow_(2).div_(x_TD.shape[-1])
    rstd_T1 = rstd_T1.add_(eps).rsqrt_()
    return rms_norm_apply(x_TD, rstd_T1, weight_D), rstd_T1


def rms_norm_apply(x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor) -> Tensor:
    """The normed tokens once more, from the kept statistics: cheaper to rebuild than to keep."""
    return (x_TD.float() * rstd_T1).to(x_TD.dtype).mul_(weight_D)


def rms_norm_backward(dy_TD: Tensor, x_TD: Tensor, rstd_T1: Tensor, weight_D: Tensor) -> Tensor:
    """Gradient of the input (T, D), in the input's dtype; the weight is frozen.

    With ``n = x * rstd`` and ``g = dy * weight``: ``dx = rstd * (g - n * mean(g * n))``.
    """
    normed_TD = x_TD.float() * rstd_T1
    g_TD = dy_TD.float() * weight_D.float()
    mean_T1 = (g_TD * normed_TD).mean(-1, keepdim=True)
    return g_TD.sub_(normed_TD.mul_(mean_T1)).mul_(rstd_T1).to(x_TD.dtype)
