"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Hugging Face checkpoints.

Frequencies and their scaling belong to the model; this file turns positions into angles' cosines and sines and
rotates. A rotation's gradient is the opposite rotation, so the backward is ``rope(dq, cos, -sin)``.

Shapes: T tokens, H heads, d head size, R <= d rotated size; cos and sin are (..., R) with the half repeated.
"""

import torch
from torch import Tensor

from jebi.kernels.low_rank import LowRank, added


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


def rope_added(
    qkv: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], shares: list[LowRank | None], head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys turned and values as they are (T, H, head each), their shares added to all three before.

    May write over the tensors given. On a card and where they are columns of one matrix it is one launch.

    Args:
        qkv: the maps' outputs (T, N each).
        tables: cosines and sines (T, R).
        shares: what is still to be added to each.
        head: size of a head.
    """
    whole_TN = adjacent(list(qkv))
    if whole_TN is not None and whole_TN.is_cuda:
        from jebi.kernels.gpu import rope as gpu

        given = shares[0], shares[1], shares[2]
        if gpu.same_strides(given):
            counts = [x.shape[1] // head for x in qkv]
            whole_THd = whole_TN.unflatten(1, (-1, head))
            gpu.rotate_added_(whole_THd, *tables, counts[0], counts[1], given)
            q, k, v = whole_THd.split(counts, dim=1)
            return q, k, v
    q, k, v = (added(x, share).unflatten(1, (-1, head)) for x, share in zip(qkv, shares))
    return rope_(q, *tables), rope_(k, *tables), v


def adjacent(parts: list[Tensor]) -> Tensor | None:
    """The matrix whose columns these are, one behind the other; None where they lie otherwise."""
    first, widths = parts[0], [part.shape[1] for part in parts]
    offsets = [(part.data_ptr() - first.data_ptr()) // first.element_size() for part in parts]
    follow = all(offset == sum(widths[:n]) for n, offset in enumerate(offsets))
    if follow and all(part.stride() == first.stride() for part in parts) and first.stride(0) >= sum(widths):
        return first.as_strided((first.shape[0], sum(widths)), first.stride())
    return None
