"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.

Frequencies and their scaling belong to the model; this file turns positions into angles' cosines and sines and
rotates. A rotation's gradient is the opposite rotation, so the backward is ``rope(dq, cos, -sin)``.

Shapes: T tokens, H heads, d head size; cos and sin are (..., d) with the half repeated.
"""

import torch
from torch import Tensor


def rope_tables(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * inv_freq``, each (*positions.shape, d), computed in float32.

    Args:
        positions: integer positions, any shape.
        inv_freq: (d / 2,) float32.
        scaling: factor on both tables (YaRN's and longrope's attention factor; 1.0 otherwise).
        dtype: what the tables are rounded to.
    """
    angles = positions[..., None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rope(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotate every head of every token: ``x * cos + rotate_half(x) * sin``; differentiable.

    Args:
        x_THd: (..., T, H, d).
        cos_Td: (..., T, d), broadcast over the heads.
        sin_Td: like ``cos_Td``.
    """
    half = x_THd.shape[-1] // 2
    turned_THd = torch.cat((-x_THd[..., half:], x_THd[..., :half]), dim=-1)
    return x_THd * cos_Td.unsqueeze(-2) + turned_THd * sin_Td.unsqueeze(-2)
