"""Attention of a new token a row over a static cache in one launch: heads normed and turned, the new key and value
stored, the keys taken in splits, and these put together by the program of a key head that ends last.

Shapes are `kernels.cached_attention`'s; Q queries of one key head (H / G, padded to 16 or more, so that a group shares
each tile of keys and the matrix units are served), P splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.cached_attention import Form
from jebi.kernels.gpu.dependent import await_inputs, let_next_begin, overlaps
from jebi.kernels.gpu.launch import launch

MOST = 32
"""Queries of one key head; more would not fit a card's shared memory everywhere."""
_KEYS = 64
"""Keys of a tile, at most; 16 at least, which matrix units want."""
_TILE_BYTES = 16384
"""Of a tile, at most: 64 keys of 128 values in 16 bits."""
_PROGRAMS = 264
"""Programs that fill a card twice, by which the keys are split; a split has one tile at least."""
_MOST_SPLITS = 64
_AT_ONCE = 4096
"""Numbers that a program puts together at once. Four times as many take 12.6 us instead of 14.0 for a row of 4,160
tokens, which has 32 splits, and 5.6 instead of 5.1 for one of 160, where most are masked then (H200, Llama 8B)."""
_WARPS = 8
"""Four take 87 us instead of 70 for 16 rows of 4,160 tokens, and for shorter ones as long."""


def tile_of(size: int, itemsize: int) -> int:
    """Keys of a tile, for heads of this size and bytes a value."""
    return min(_KEYS, max(16, _TILE_BYTES // (int(triton.next_power_of_2(size)) * itemsize)))


def stages_of(itemsize: int) -> int:
    """Tiles of keys and values under way at once: in float32 several would not fit everywhere into shared memory."""
    return 1 if itemsize == 4 else 3


def splits_of(rows: int, length: int, tile: int) -> int:
    """Into how many parts the keys are cut, for ``rows`` times key heads and a cache of ``length``."""
    return max(1, min(_PROGRAMS // rows, -(-length // tile), _MOST_SPLITS))


def sizes_of(queries: int, size: int, itemsize: int) -> dict[str, int]:
    """A kernel's constants for so many queries of a key head, and heads of this size and bytes a value."""
    real, wide = triton.next_power_of_2(queries), triton.next_power_of_2(size)
    chunk = min(_MOST_SPLITS, max(1, _AT_ONCE // (real * wide)))
    return {"QUERIES": max(16, real), "REAL": real, "CHUNK": chunk, "TILE": tile_of(size, itemsize), "SIZE": wide}


def attend(
    qkv_BN: Tensor,
    tables: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    end_B: Tensor,
    form: Form,
    counts: Tensor,
    out_BN: Tensor,
) -> None:
    """Write the attention into the contiguous ``out_BN``, and the new keys and values into the caches.

    See `kernels.cached_attention`; tables, and each row of ``qkv_BN``, are contiguous.
    """
    k_BGLd, v_BGLd = caches
    cos_BR, sin_BR = tables
    batch, groups, length, size = k_BGLd.shape
    heads, device, overlap = out_BN.shape[1] // size, qkv_BN.device, overlaps(qkv_BN)
    queries = heads // groups
    assert queries <= MOST
    sizes = sizes_of(queries, size, qkv_BN.itemsize)
    splits = splits_of(batch * groups, length, sizes["TILE"])
    parts = torch.empty(batch * heads, splits, size, dtype=torch.float32, device=device)
    tops, sums = torch.empty(2, batch * heads, splits, dtype=torch.float32, device=device)
    q_norm, k_norm, eps, unit_offset = form.norms if form.norms is not None else (qkv_BN, qkv_BN, 0.0, False)
    launch(
        _attend, (batch * groups, splits),
        qkv_BN, cos_BR, sin_BR, q_norm, k_norm, k_BGLd, v_BGLd, end_B, counts, parts, tops, sums, out_BN,
        qkv_BN.stride(0), *k_BGLd.stride()[:3], *v_BGLd.stride()[:3],
        form.scale, form.window or 0, form.softcap or 0.0, eps, form.value_scale,
        groups, queries, cos_BR.shape[1] // 2, size,
        NORM=form.norms is not None, UNIT_OFFSET=unit_offset,
        WINDOWED=form.window is not None, CAPPED=form.softcap is not None, WHOLE=splits == 1,
        **sizes, OVERLAP=overlap, launch_pdl=overlap, num_warps=_WARPS, num_stages=stages_of(qkv_BN.itemsize),
    )  # fmt: skip


@triton.jit
def _attend(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, k_ptr, v_ptr, end_ptr, count_ptr, part_ptr, top_ptr, sum_ptr,
    out_ptr, stride, k_row, k_head, k_place, v_row, v_head, v_place,
    scale, window, softcap, eps, value_scale, groups, queries, half, size,
    NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
    QUERIES: tl.constexpr, REAL: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_begin()
        await_inputs()
    dtype = qkv_ptr.dtype.element_ty
    row, group = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    heads = groups * queries
    query, column = tl.arange(0, QUERIES), tl.arange(0, SIZE)
    own, turning = qkv_ptr + row * stride, row * 2 * half + column
    cos = tl.load(cos_ptr + turning, column < 2 * half, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + turning, column < 2 * half, other=0.0).to(tl.float32)
    real, fits = (query < queries)[:, None], (column < size)[None]
    at = own + (group * queries + query)[:, None] * size
    q = _turned(at, real, column, q_norm_ptr, cos, sin, half, size, eps, dtype, NORM, UNIT_OFFSET)
    k_start, v_start = k_ptr + row * k_row + group * k_head, v_ptr + row * v_row + group * v_head
    end = tl.load(end_ptr + row)
    low = tl.maximum(end - window, 0) // TILE * TILE if WINDOWED else 0
    # What a row has is cut, not what the cache could hold.
    split = tl.cdiv(tl.cdiv(end - low, tl.num_programs(1)), TILE) * TILE
    start = low + tl.program_id(1) * split
    stop = tl.minimum(start + split, end)
    if (start < stop) & (stop == end):
        one, new = tl.full((1, 1), True, tl.int1), (end - 1).to(tl.int64)
        new_at = own + (heads + group + tl.zeros((1, 1), tl.int32)) * size
        new_k = _turned(new_at, one, column, k_norm_ptr, cos, sin, half, size, eps, dtype, NORM, UNIT_OFFSET)
        new_v = tl.load(new_at + groups * size + column[None], fits, other=0.0).to(tl.float32) * value_scale
        tl.store(k_start + new * k_place + column[None], new_k.to(k_ptr.dtype.element_ty), fits)
        tl.store(v_start + new * v_place + column[None], new_v.to(v_ptr.dtype.element_ty), fits)
    tl.debug_barrier()  # Before other threads of that program read them.
    top, total = tl.full((QUERIES,), -1e30, tl.float32), tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, SIZE), tl.float32)
    for first in range(start, stop, TILE):
        place = first + tl.arange(0, TILE)
        inside = (place < stop)[:, None] & fits
        k = tl.load(k_start + place.to(tl.int64)[:, None] * k_place + column, inside, other=0.0)
        v = tl.load(v_start + place.to(tl.int64)[:, None] * v_place + column, inside, other=0.0)
        scores = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * _tanh(scores / softcap)
        seen = place < stop
        if WINDOWED:
            seen = seen & (place >= end - window)
        scores = tl.where(seen[None], scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(seen[None], tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(shares, 1)
        sums = tl.dot(shares.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
        top = higher
    if WHOLE:
        target = out_ptr + ((row * heads + group * queries) + query)[:, None] * size + column
        tl.store(target, (sums / total[:, None]).to(dtype), real & fits)
    else:
        splits = tl.num_programs(1)
        mine = (row * heads + group * queries + query) * splits + tl.program_id(1)
        tl.store(top_ptr + mine, top, query < queries)
        tl.store(sum_ptr + mine, total, query < queries)
        tl.store(part_ptr + mine[:, None] * size + column, sums, real & fits)
        tl.debug_barrier()  # All of it is written before it counts.
        if tl.atomic_add(count_ptr + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
            tl.store(count_ptr + tl.program_id(0), 0)
            _combine(
                part_ptr, top_ptr, sum_ptr, out_ptr, row * heads + group * queries, queries, splits, size, dtype,
                REAL, CHUNK, SIZE,
            )  # fmt: skip


@triton.jit
def _turned(
    at, there, column, norm_ptr, cos, sin, half, size, eps, dtype: tl.constexpr, NORM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Heads (X, SIZE), which begin ``at`` (X, 1), normed and turned; of ``dtype``."""
    across = tl.where(column < half, column + half, column - half)
    fits, turns = (column < size)[None] & there, (column < 2 * half)[None] & there
    x = tl.load(at + column[None], fits, other=0.0).to(tl.float32)
    other = tl.load(at + across[None], turns, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
        x_weight = tl.load(norm_ptr + column, column < size, other=0.0).to(tl.float32)
        other_weight = tl.load(norm_ptr + across, column < 2 * half, other=0.0).to(tl.float32)
        x = _normed(x, rstd, x_weight[None], dtype, UNIT_OFFSET)
        other = _normed(other, rstd, other_weight[None], dtype, UNIT_OFFSET)
    return (x * cos[None] + tl.where(column < half, -other, other) * sin[None]).to(dtype)


@triton.jit
def _normed(x, rstd, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """Rounded where `gpu.rms_norm` rounds."""
    y = x * rstd * (1.0 + weight) if UNIT_OFFSET else (x * rstd).to(dtype).to(tl.float32) * weight
    return y.to(dtype).to(tl.float32)


@triton.jit
def _tanh(x):
    """Lambert's continued fraction near zero, where the other form cancels; that one overflows nowhere."""
    y = x * x
    near = x * (10395.0 + y * (1260.0 + y * 21.0)) / (10395.0 + y * (4725.0 + y * (210.0 + y)))
    return tl.where(y < 1.0, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _combine(
    part_ptr, top_ptr, sum_ptr, out_ptr, head, queries, splits, size, dtype: tl.constexpr, REAL: tl.constexpr,
    CHUNK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Put the splits of a key head's queries together, the first of which is ``head``; past what this program wrote."""
    query, column = tl.arange(0, REAL), tl.arange(0, SIZE)
    mine, real, fits = (head + query)[:, None] * splits, (query < queries)[:, None], (column < size)[None]
    top, total = tl.full((REAL,), -1e30, tl.float32), tl.zeros((REAL,), tl.float32)
    out = tl.zeros((REAL, SIZE), tl.float32)
    for first in range(0, splits, CHUNK):
        some = first + tl.arange(0, CHUNK)
        at, there = mine + some, real & (some < splits)[None]
        tops = tl.load(top_ptr + at, there, other=-1e30, cache_modifier=".cg")
        totals = tl.load(sum_ptr + at, there, other=0.0, cache_modifier=".cg")
        part_at, inside = at[:, :, None] * size + column, there[:, :, None] & fits[None]
        parts = tl.load(part_ptr + part_at, inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, 1))
        shares, fade = tl.exp(tops - higher[:, None]), tl.exp(top - higher)
        total = total * fade + tl.sum(totals * shares, 1)
        out = out * fade[:, None] + tl.sum(parts * shares[:, :, None], 1)
        top = higher
    tl.store(out_ptr + (head + query)[:, None] * size + column, (out / total[:, None]).to(dtype), real & fits)
