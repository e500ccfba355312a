"""Attention of few new tokens over a static key/value cache, and how their keys and values come into it.

The cache is one tensor a layer that never moves, so that a captured graph may replay; how much of it each row has is on
the card as well. When it is made and grown is the caller's. A card takes the keys in splits, which are put together
afterwards (flash-decoding, arXiv:2311.01282).

Shapes: B rows, S new tokens of each, H query heads, G key/value heads, d head size, R <= d rotated size, L places of
the cache.
"""

import torch
from torch import Tensor

from jebi.kernels.linear_cross_entropy import softcapped
from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope

Extent = tuple[Tensor, Tensor]
"""Each row's first place in the cache (behind its padding on the left), and the one behind its last, the new tokens'
included: int32 (B,)."""

Form = tuple[float, int | None, float | None]
"""Scale of the scores, window and cap, as `nn.attention.AttentionForm` has them."""

HeadNorms = tuple[Tensor, Tensor, float, bool]
"""Weights (d,) of the norms that each head's query and key go through, eps and unit_offset."""


def cached_attention(q_BSHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, extent: Extent, form: Form) -> Tensor:
    """Causal attention of the new tokens, which the cache already holds. Returns (B, S, H, d), contiguous.

    Args:
        q_BSHd: queries, turned; on a card ``S * H / G`` of at most 32.
        k_BGLd: keys, places strided as they like, values of a head contiguous. What lies outside a row's extent is
            never looked at, but is finite.
        v_BGLd: likewise.
        extent: of each row.
        form: of the scores.
    """
    if not q_BSHd.is_cuda:
        return cached_attention_reference(q_BSHd, k_BGLd, v_BGLd, extent, form)
    from jebi.kernels.gpu import cached_attention as gpu

    out_BSHd = torch.empty(q_BSHd.shape, dtype=q_BSHd.dtype, device=q_BSHd.device)
    gpu.attend(q_BSHd, k_BGLd, v_BGLd, extent, form, out_BSHd)
    return out_BSHd


def cached_attention_reference(q_BSHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, extent: Extent, form: Form) -> Tensor:
    """`cached_attention` in plain torch: all scores at once, in float32 or finer."""
    (first_B, end_B), (scale, window, softcap) = extent, form
    new, groups = q_BSHd.shape[1], k_BGLd.shape[1]
    place_L = torch.arange(k_BGLd.shape[2], device=q_BSHd.device)
    stands_BS = end_B[:, None] - new + torch.arange(new, device=q_BSHd.device)
    back_BSL = stands_BS[..., None] - place_L
    seen_BSL = (back_BSL >= 0) & (place_L >= first_B[:, None, None])
    if window is not None:
        seen_BSL &= back_BSL < window
    q_BGRSd = q_BSHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    wide = torch.promote_types(q_BSHd.dtype, torch.float32)
    scores_BGRSL = softcapped(q_BGRSd.to(wide) @ k_BGLd.to(wide)[:, :, None].transpose(-1, -2) * scale, softcap)
    shares_BGRSL = scores_BGRSL.masked_fill(~seen_BSL[:, None, None], float("-inf")).softmax(-1)
    out_BGRSd = shares_BGRSL.to(v_BGLd.dtype) @ v_BGLd[:, :, None]
    return out_BGRSd.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def turned_and_stored(
    qkv_TN: Tensor,
    tables: tuple[Tensor, Tensor],
    k_BGLd: Tensor,
    v_BGLd: Tensor,
    end_B: Tensor,
    norms: HeadNorms | None = None,
    value_scale: float = 1.0,
) -> Tensor:
    """Turn the new tokens' queries and keys, put keys and values into the cache; one launch on a card.

    Args:
        qkv_TN: (B * S, (H + 2 G) d), queries, keys and values of each new token side by side, row after row.
        tables: cosine and sine (B * S, R), from `rope_tables`.
        k_BGLd: written at the places before ``end_B``.
        v_BGLd: likewise.
        end_B: each row's end, the new tokens included; int32.
        norms: what queries and keys go through before they are turned.
        value_scale: a factor on the values, a power of two.

    Returns:
        The queries, (B, S, H, d), contiguous.
    """
    if not qkv_TN.is_cuda:
        return turned_and_stored_reference(qkv_TN, tables, k_BGLd, v_BGLd, end_B, norms, value_scale)
    from jebi.kernels.gpu import cached_attention as gpu

    batch, groups, _, size = k_BGLd.shape
    heads = qkv_TN.shape[1] // size - 2 * groups
    q_BSHd = torch.empty(batch, qkv_TN.shape[0] // batch, heads, size, dtype=qkv_TN.dtype, device=qkv_TN.device)
    gpu.turn_and_store(qkv_TN, tables, (k_BGLd, v_BGLd), end_B, norms, value_scale, q_BSHd)
    return q_BSHd


def turned_and_stored_reference(
    qkv_TN: Tensor,
    tables: tuple[Tensor, Tensor],
    k_BGLd: Tensor,
    v_BGLd: Tensor,
    end_B: Tensor,
    norms: HeadNorms | None = None,
    value_scale: float = 1.0,
) -> Tensor:
    """`turned_and_stored` in plain torch."""
    batch, groups, _, size = k_BGLd.shape
    qkv_THd = qkv_TN.unflatten(1, (-1, size))
    q_THd, k_TGd, v_TGd = qkv_THd.split([qkv_THd.shape[1] - 2 * groups, groups, groups], dim=1)
    if norms is not None:
        q_THd, k_TGd = (rms_norm(x, weight, *norms[2:]) for x, weight in ((q_THd, norms[0]), (k_TGd, norms[1])))
    q_THd, k_TGd = rope(q_THd, *tables), rope(k_TGd, *tables)
    new = qkv_TN.shape[0] // batch
    place_BS = end_B[:, None] - new + torch.arange(new, device=end_B.device)
    row_B1 = torch.arange(batch, device=end_B.device)[:, None]
    for cache, fresh_TGd in ((k_BGLd, k_TGd), (v_BGLd, v_TGd * value_scale)):
        cache.transpose(1, 2)[row_B1, place_BS] = fresh_TGd.unflatten(0, (batch, new)).to(cache.dtype)
    q_BSHd: Tensor = q_THd.unflatten(0, (batch, new)).contiguous()
    return q_BSHd
