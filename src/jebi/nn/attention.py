"""Causal attention: one seam over torch's backends, for flat rows and for cached decoding.

Projections and rotary positions are the layer's; this file sees ready q, k and v.

Shapes: U held tokens, T tokens of all whole rows (`nn.rows`), H query heads, G key/value heads, d head size; B batch,
S new tokens, L cached length; Q and K queries and keys of one block.
"""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from jebi.kernels.linear_cross_entropy import softcapped
from jebi.nn.rows import Rows
from jebi.nn.shape import AttentionForm

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_BLOCK = 512
"""Queries whose scores exist at once where they must be written out (softcapping)."""


def attend_rows(q_UHd: Tensor, k_UGd: Tensor, v_UGd: Tensor, rows: Rows, form: AttentionForm) -> Tensor:
    """Causal attention inside each row, never across; differentiable. Returns (U, H, d)."""
    return rows.gather(_attend_whole(rows.spread(q_UHd), rows.spread(k_UGd), rows.spread(v_UGd), rows, form))


def _attend_whole(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, rows: Rows, form: AttentionForm) -> Tensor:
    """The same on whole rows.

    On a CUDA card of compute capability 8.0 or newer and in 16 bits, rows of one length go through cuDNN (2 of 2,048
    tokens, Llama 8B's heads, H100: 0.64 ms with backward, where flash attention takes 1.1) and others through one
    variable-length call. Elsewhere row by row, which on a CPU costs nothing (a small call a row) and makes no padding.
    """
    if form.softcap is None and varlen_serves(q_THd.device, q_THd.dtype):
        if rows.alike and form.window is None:
            return _rows_alike(q_THd, k_TGd, v_TGd, len(rows.starts) - 1, form)
        return _varlen(q_THd, k_TGd, v_TGd, rows, form)
    if q_THd.device.type == "cpu" and q_THd.dtype != torch.float32:
        # torch's CPU attention is slower in 16 bits than in 32: 8 rows of 225 tokens, 31 ms against 24 with backward.
        return _attend_whole(q_THd.float(), k_TGd.float(), v_TGd.float(), rows, form).to(q_THd.dtype)
    parts = [_one_row(q_THd[s:e], k_TGd[s:e], v_TGd[s:e], form) for s, e in rows.spans()]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _rows_alike(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, count: int, form: AttentionForm) -> Tensor:
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=form.scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, rows: Rows, form: AttentionForm) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = rows.cu_seqlens(), rows.longest
    window = (-1 if form.window is None else form.window - 1, 0)
    settings: dict[str, Any] = {"scale": form.scale, "window_size": window}
    if "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 takes fewer keys than queries without being told
        settings["enable_gqa"] = True
    out = varlen_attn(q_THd, k_TGd, v_TGd, cu, cu, longest, longest, **settings)
    assert isinstance(out, Tensor), "asked for no more than that"
    return out


def attend_cached(
    q_BSHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BSL: Tensor | None, form: AttentionForm
) -> Tensor:
    """Attention of new tokens over a cache that already holds their keys. Returns (B, S, H, d).

    Args:
        q_BSHd: queries of the new tokens.
        k_BGLd: all keys, the new ones last.
        v_BGLd: all values.
        mask_BSL: True where a query may look, ``form.window`` regarded; None when every query may look at everything
            up to itself.
        form: scale and softcapping.
    """
    causal = mask_BSL is None and q_BSHd.shape[1] > 1
    assert not causal or q_BSHd.shape[1] == k_BGLd.shape[2], "a mask is needed when a chunk meets an older cache"
    on_cpu_in_16_bits = q_BSHd.device.type == "cpu" and q_BSHd.dtype != torch.float32
    if form.softcap is not None or (on_cpu_in_16_bits and q_BSHd.shape[1] == 1 and q_BSHd.shape[0] > 1):
        if causal:
            mask_BSL = seen(q_BSHd.shape[1], q_BSHd.shape[1], 0, None, q_BSHd.device)[None]
        return _written_out(q_BSHd, k_BGLd, v_BGLd, mask_BSL, form)
    if on_cpu_in_16_bits and q_BSHd.shape[1] > 1:
        return attend_cached(q_BSHd.float(), k_BGLd.float(), v_BGLd.float(), mask_BSL, form).to(q_BSHd.dtype)
    mask = None if mask_BSL is None else mask_BSL[:, None]
    out_BHSd = F.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2), k_BGLd, v_BGLd, mask, is_causal=causal, scale=form.scale, enable_gqa=True
    )
    return out_BHSd.transpose(1, 2)


def _written_out(
    q_BSHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_BSL: Tensor | None, form: AttentionForm
) -> Tensor:
    """By plain products, scores in float32.

    For one new token a row it is also the fastest on a CPU in 16 bits: 20 rows of 205 tokens in 0.5 ms, where SDPA in
    bfloat16 takes 2.7.
    """
    batch, new, heads, size = q_BSHd.shape
    groups = k_BGLd.shape[1]
    # The heads of a group share its keys: their queries lie below each other.
    q_BGNd = q_BSHd.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scale = form.scale
    if q_BGNd.dtype == torch.float16:
        # Scores without their scale may be beyond 65,504.
        q_BGNd, scale = q_BGNd * scale, 1.0
    scores_BGNL = softcapped((q_BGNd @ k_BGLd.transpose(-1, -2)).float() * scale, form.softcap)
    scores_BGRSL = scores_BGNL.unflatten(2, (-1, new))
    if mask_BSL is not None:
        scores_BGRSL = scores_BGRSL.masked_fill(~mask_BSL[:, None, None], float("-inf"))
    out_BGNd: Tensor = scores_BGRSL.softmax(-1).to(v_BGLd.dtype).flatten(2, 3) @ v_BGLd
    out_BSHd: Tensor = out_BGNd.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).reshape(batch, new, heads, size)
    return out_BSHd


def _one_row(q_SHd: Tensor, k_SGd: Tensor, v_SGd: Tensor, form: AttentionForm) -> Tensor:
    """One whole row; where a window or a cap rules out the plain call, block by block of queries."""
    length = q_SHd.shape[0]
    windowed = form.window is not None and form.window < length
    if form.softcap is None and not windowed:
        return _product(q_SHd, k_SGd, v_SGd, None, form)
    step = _BLOCK if form.softcap is not None or form.window is None else max(_BLOCK, form.window)
    parts = []
    for start in range(0, length, step):
        end = min(start + step, length)
        first = max(0, start - form.window + 1) if form.window is not None else 0
        seen_QK = seen(end - start, end - first, start - first, form.window, q_SHd.device)
        block = (q_SHd[start:end], k_SGd[first:end], v_SGd[first:end], seen_QK, form)
        # A block's scores are made again in the backward: kept, they would grow with the square of the row.
        parts.append(
            checkpoint(_product, *block, use_reentrant=False) if form.softcap is not None else _product(*block)
        )
    return torch.cat(parts)


def _product(q_QHd: Tensor, k_KGd: Tensor, v_KGd: Tensor, seen_QK: Tensor | None, form: AttentionForm) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QHd, k_KGd, v_KGd))
    if form.softcap is not None:
        assert seen_QK is not None
        return _written_out(q_QHd[None], k, v, seen_QK[None], form)[0]
    if q.is_cuda and not varlen_serves(q.device, q.dtype):
        k, v = (_for_every_query(x, q.shape[1]) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, seen_QK, is_causal=seen_QK is None, scale=form.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _for_every_query(x_1GKd: Tensor, heads: int) -> Tensor:
    """Keys or values once for every query head.

    Below compute capability 8.0, and in float32, only memory-efficient attention is left, which takes no groups of
    heads: torch would write all scores out in float32 instead.
    """
    return x_1GKd.repeat_interleave(heads // x_1GKd.shape[1], dim=1)


def seen(queries: int, keys: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) booleans: which keys each query may look at, the first query standing at key ``past``."""
    back_QK = torch.arange(past, past + queries, device=device)[:, None] - torch.arange(keys, device=device)
    return back_QK >= 0 if window is None else (back_QK >= 0) & (back_QK < window)


def varlen_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of any lengths go through one call there, without the host knowing the lengths."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
