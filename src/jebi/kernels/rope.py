"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.

Frequencies and their scaling belong to the model; this file turns positions into angles' cosines and sines and
rotates. A rotation's gradient is the opposite rotation, so the backward is ``rope(dq, cos, -sin)``.

Shapes: T tokens, H heads, d head size, R <= d rotated size; cos and sin are (..., R) with the half repeated.
"""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * inv_freq``, each (*positions.shape, R), computed in float32.

    Args:
        positions: integer positions, any shape.
        inv_freq: (R / 2,) float32, or (..., R / 2) where tokens differ in it.
        scaling: factor on both tables (YaRN's and longrope's attention factor; 1.0 otherwise).
        dtype: what the tables are rounded to.
    """
    angles = positions[..., None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rope(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate every head of every token: ``x * cos + rotate_half(x) * sin``; differentiable.

    Tables narrower than a head rotate its first R dimensions and leave the others (partial rotary).

    Args:
        x_THd: (..., T, H, d).
        cos_TR: (..., T, R), broadcast over the heads.
        sin_TR: like ``cos_TR``.
    """
    size = cos_TR.shape[-1]
    if size < x_THd.shape[-1]:
        return torch.cat((rope(x_THd[..., :size], cos_TR, sin_TR), x_THd[..., size:]), dim=-1)
    half = size // 2
    turned_THd = torch.cat((-x_THd[..., half:], x_THd[..., :half]), dim=-1)
    return x_THd * cos_TR.unsqueeze(-2) + turned_THd * sin_TR.unsqueeze(-2)


def rope_(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor, backwards: bool = False) -> Tensor:
    """The same without a graph. May write over ``x_THd``, which must not be used afterwards.

    ``backwards`` turns the other way: the gradient of a turned head becomes that of the head before.
    """
    if x_THd.is_cuda:
        return rope_into(x_THd, cos_TR, sin_TR, x_THd, backwards)
    return rope(x_THd, cos_TR, -sin_TR if backwards else sin_TR)


def rope_into(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor, out_THd: Tensor, backwards: bool = False) -> Tensor:
    """The same, written into ``out_THd``, whose tokens and heads may be strided."""
    if x_THd.is_cuda:
        from jebi.kernels.gpu import rope as gpu

        gpu.rotate(x_THd, cos_TR, sin_TR, out_THd, backwards)
        return out_THd
    return out_THd.copy_(rope(x_THd, cos_TR, -sin_TR if backwards else sin_TR))
