"""Attention of one new token a row over a static key/value cache, from the product of q, k and v on: heads are normed,
turned, and the new keys and values put into the cache on the way.

The cache is one tensor a layer that never moves, so that a captured graph may replay; how much of it each row has is on
the card as well. When it is made and grown is the caller's. A card does all of it in one launch: the keys are taken in
splits (flash-decoding, arXiv:2311.01282), and the program of a row that ends last puts them together.

Shapes: B rows, H query heads, G key/value heads, d head size, R <= d rotated size, L places of the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.kernels.linear_cross_entropy import softcapped
from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope

HeadNorms = tuple[Tensor, Tensor, float, bool]
"""Weights (d,) of the norms that each head's query and key go through, eps and unit_offset."""


@dataclass(frozen=True)
class Form:
    """What a layer does to its heads."""

    scale: float
    """Of the scores."""
    window: int | None = None
    """How many keys back a query looks, its own counted; None for all."""
    softcap: float | None = None
    """``cap * tanh(score / cap)``."""
    norms: HeadNorms | None = None
    """What queries and keys go through before they are turned."""
    value_scale: float = 1.0
    """A factor on the values, a power of two."""


def cached_attention(
    qkv_BN: Tensor,
    tables: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    end_B: Tensor,
    form: Form,
    counts: Tensor,
) -> Tensor:
    """The attention of each row's new token, (B, H d).

    Args:
        qkv_BN: (B, (H + 2 G) d), queries, keys and values of the new tokens side by side; on a card ``H / G`` of at
            most 32.
        tables: cosine and sine (B, R), from `rope_tables`, contiguous.
        caches: keys and values (B, G, L, d), places strided as they like, values of a head contiguous; the new ones are
            written to the place before each row's end. What lies behind is never looked at, but is finite.
        end_B: each row's end, the new token included, 1 to L; int32.
        form: of the heads.
        counts: B * G zeros, int32, that are zeros again afterwards; a card's programs count in them who is the last.
    """
    assert counts.dtype == torch.int32
    assert counts.numel() == caches[0].shape[0] * caches[0].shape[1]
    if not qkv_BN.is_cuda:
        return cached_attention_reference(qkv_BN, tables, caches, end_B, form)
    from jebi.kernels.gpu import cached_attention as gpu

    batch, groups, _, size = caches[0].shape
    out_BN = torch.empty(batch, qkv_BN.shape[1] - 2 * groups * size, dtype=qkv_BN.dtype, device=qkv_BN.device)
    gpu.attend(qkv_BN, tables, caches, end_B, form, counts, out_BN)
    return out_BN


def cached_attention_reference(
    qkv_BN: Tensor, tables: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor], end_B: Tensor, form: Form
) -> Tensor:
    """`cached_attention` in plain torch: all scores at once, in float32 or finer."""
    batch, groups, length, size = caches[0].shape
    qkv_BHd = qkv_BN.unflatten(1, (-1, size))
    q_BHd, k_BGd, v_BGd = qkv_BHd.split([qkv_BHd.shape[1] - 2 * groups, groups, groups], dim=1)
    if form.norms is not None:
        q_BHd, k_BGd = (rms_norm(x, w, *form.norms[2:]) for x, w in zip((q_BHd, k_BGd), form.norms[:2]))
    q_BHd, k_BGd = rope(q_BHd, *tables), rope(k_BGd, *tables)
    row_B = torch.arange(batch, device=end_B.device)
    for cache, new_BGd in zip(caches, (k_BGd, v_BGd * form.value_scale)):
        cache[row_B, :, end_B.long() - 1] = new_BGd.to(cache.dtype)
    back_BL = end_B[:, None] - 1 - torch.arange(length, device=end_B.device)
    seen_BL = back_BL >= 0 if form.window is None else (back_BL >= 0) & (back_BL < form.window)
    wide = torch.promote_types(q_BHd.dtype, torch.float32)
    q_BGRd = q_BHd.unflatten(1, (groups, -1)).to(wide)
    scores_BGRL = softcapped(q_BGRd @ caches[0].to(wide).transpose(-1, -2) * form.scale, form.softcap)
    shares_BGRL = scores_BGRL.masked_fill(~seen_BL[:, None, None], float("-inf")).softmax(-1)
    return (shares_BGRL.to(caches[1].dtype) @ caches[1]).flatten(1)
