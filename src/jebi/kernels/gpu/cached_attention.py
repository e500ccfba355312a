"""Attention over a static cache in splits of the keys, and the turning and storing of new keys and values.

Shapes are `kernels.cached_attention`'s; Q queries of one key head (S * H / G of them, padded to 16 or more, so that a
group shares each tile of keys and the matrix units are served), P splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.cached_attention import Extent, Form, HeadNorms
from jebi.kernels.gpu.dependent import await_inputs, let_next_begin, overlaps
from jebi.kernels.gpu.launch import launch

MOST = 32
"""Queries of one key head; more would not fit a card's shared memory everywhere."""
_KEYS = 64
"""Keys of a tile where a head has at most 128 values; half of it beyond."""
_PROGRAMS = 264
"""Programs that fill a card twice, by which the keys are split; a split has one tile at least."""
_MOST_SPLITS = 64


def tile_of(size: int) -> int:
    """Keys of a tile, for heads of this size."""
    return _KEYS if size <= 128 else _KEYS // 2


def stages_of(q: Tensor) -> int:
    """Tiles of keys and values under way at once: in float32 several would not fit everywhere into shared memory."""
    return 1 if q.dtype == torch.float32 else 3


def splits_of(rows: int, length: int, tile: int) -> int:
    """Into how many parts the keys are cut, for ``rows`` times key heads and a cache of ``length``."""
    return max(1, min(_PROGRAMS // rows, -(-length // tile), _MOST_SPLITS))


def attend(q_BSHd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, extent: Extent, form: Form, out_BSHd: Tensor) -> None:
    """Write the attention into ``out_BSHd``; this and the queries contiguous. See `kernels.cached_attention`."""
    batch, new, heads, size = q_BSHd.shape
    groups, length = k_BGLd.shape[1:3]
    scale, window, softcap = form
    queries, device, overlap = new * heads // groups, q_BSHd.device, overlaps(q_BSHd)
    assert queries <= MOST
    tile = tile_of(size)
    splits = splits_of(batch * groups, length, tile)
    rows = batch * new * heads
    parts = torch.empty(rows, splits, size, dtype=torch.float32, device=device)
    tops, sums = torch.empty(2, rows, splits, dtype=torch.float32, device=device)
    launch(
        _attend, (batch * groups, splits),
        q_BSHd.contiguous(), k_BGLd, v_BGLd, *extent, parts, tops, sums, out_BSHd,
        *k_BGLd.stride()[:3], *v_BGLd.stride()[:3], length,
        scale, window or 0, softcap or 0.0, heads, groups, new, queries, size,
        WINDOWED=window is not None, CAPPED=softcap is not None, WHOLE=splits == 1,
        QUERIES=max(16, triton.next_power_of_2(queries)), TILE=tile, SIZE=triton.next_power_of_2(size),
        OVERLAP=overlap, launch_pdl=overlap, num_warps=4, num_stages=stages_of(q_BSHd),
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine, (rows,),
            parts, tops, sums, out_BSHd, splits, size,
            SPLITS=_MOST_SPLITS, SIZE=triton.next_power_of_2(size),
            OVERLAP=overlap, launch_pdl=overlap, num_warps=4,
        )  # fmt: skip


def turn_and_store(
    qkv_TN: Tensor,
    tables: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    end_B: Tensor,
    norms: HeadNorms | None,
    value_scale: float,
    q_BSHd: Tensor,
) -> None:
    """See `kernels.cached_attention.turned_and_stored`; queries go into the contiguous ``q_BSHd``."""
    k_BGLd, v_BGLd = caches
    cos_TR, sin_TR = (table.contiguous() for table in tables)
    (_, new, heads, size), groups, rotated = q_BSHd.shape, k_BGLd.shape[1], cos_TR.shape[1]
    q_norm, k_norm, eps, unit_offset = norms if norms is not None else (qkv_TN, qkv_TN, 0.0, False)
    launch(
        _turn_and_store, (qkv_TN.shape[0], heads + 2 * groups),
        qkv_TN, cos_TR, sin_TR, q_norm, k_norm, q_BSHd, k_BGLd, v_BGLd, end_B,
        qkv_TN.stride(0), *k_BGLd.stride()[:3], *v_BGLd.stride()[:3],
        heads, groups, new, rotated // 2, size, eps, value_scale, NORM=norms is not None, UNIT_OFFSET=unit_offset,
        HALF=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(size - rotated) if size > rotated else 0,
        OVERLAP=overlaps(qkv_TN), launch_pdl=overlaps(qkv_TN), num_warps=1,
    )  # fmt: skip


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, first_ptr, end_ptr, part_ptr, top_ptr, sum_ptr, out_ptr,
    k_row, k_head, k_place, v_row, v_head, v_place, length,
    scale, window, softcap, heads, groups, new, queries, size,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr,
    QUERIES: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_begin()
        await_inputs()
    row = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    end = tl.minimum(tl.load(end_ptr + row), length)
    first = tl.load(first_ptr + row)
    query = tl.arange(0, QUERIES)
    column = tl.arange(0, SIZE)
    # A group's heads of one token lie side by side, the next token's behind them.
    each = queries // new
    token = query // each
    head = (row * new + token) * heads + group * each + query % each
    real = query < queries
    here = real[:, None] & (column < size)[None]
    q = tl.load(q_ptr + head.to(tl.int64)[:, None] * size + column, here, other=0.0)
    stands = end - new + token
    low = first // TILE * TILE
    if WINDOWED:
        low = tl.maximum(low, tl.maximum(end - new - window + 1, 0) // TILE * TILE)
    # What a row has is cut, not what the cache could hold.
    split = tl.cdiv(tl.cdiv(tl.maximum(end - low, 0), tl.num_programs(1)), TILE) * TILE
    start = low + tl.program_id(1) * split
    stop = tl.minimum(start + split, end)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, SIZE), tl.float32)
    k_start = k_ptr + row.to(tl.int64) * k_row + group.to(tl.int64) * k_head
    v_start = v_ptr + row.to(tl.int64) * v_row + group.to(tl.int64) * v_head
    for at in range(start, stop, TILE):
        place = at + tl.arange(0, TILE)
        inside = (place < stop)[:, None] & (column < size)[None]
        k = tl.load(k_start + place.to(tl.int64)[:, None] * k_place + column, inside, other=0.0)
        v = tl.load(v_start + place.to(tl.int64)[:, None] * v_place + column, inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            # tanh(x) is 1 - 2 / (e^(2 x) + 1), which overflows nowhere.
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        back = stands[:, None] - place[None]
        seen = (back >= 0) & ((place >= first) & (place < stop))[None]
        if WINDOWED:
            seen = seen & (back < window)
        scores = tl.where(seen, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(shares, 1)
        sums = tl.dot(shares.to(v.dtype), v, sums * fade[:, None], input_precision="ieee")
        top = higher
    if WHOLE:
        # A row with nothing to look at, as one that has ended may be, gives zeros.
        out = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptr + head.to(tl.int64)[:, None] * size + column, out.to(out_ptr.dtype.element_ty), here)
    else:
        splits = tl.num_programs(1)
        own = head.to(tl.int64) * splits + tl.program_id(1)
        tl.store(top_ptr + own, top, real)
        tl.store(sum_ptr + own, total, real)
        tl.store(part_ptr + own[:, None] * size + column, sums, here)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    part_ptr, top_ptr, sum_ptr, out_ptr, splits, size,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_begin()
        await_inputs()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    column = tl.arange(0, SIZE)
    top = tl.load(top_ptr + row * splits + part, part < splits, other=-1e30)
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(tl.load(sum_ptr + row * splits + part, part < splits, other=0.0) * share, 0)
    sums = tl.load(
        part_ptr + (row * splits + part)[:, None] * size + column,
        (part < splits)[:, None] & (column < size)[None], other=0.0,
    )  # fmt: skip
    out = tl.sum(sums * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * size + column, out.to(out_ptr.dtype.element_ty), column < size)


@triton.jit
def _turn_and_store(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_ptr, v_ptr, end_ptr,
    stride, k_row, k_head, k_place, v_row, v_head, v_place, heads, groups, new, half, size, eps, value_scale,
    NORM: tl.constexpr, UNIT_OFFSET: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_begin()
        await_inputs()
    dtype = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = token // new
    place = (tl.load(end_ptr + row) - new + token % new).to(tl.int64)
    column = tl.arange(0, HALF)
    inside = column < half
    source = qkv_ptr + token * stride + head * size
    a = tl.load(source + column, inside, other=0.0).to(tl.float32)
    b = tl.load(source + half + column, inside, other=0.0).to(tl.float32)
    if REST > 0:
        behind = tl.arange(0, REST)
        beyond = behind < size - 2 * half
        rest = tl.load(source + 2 * half + behind, beyond, other=0.0).to(tl.float32)
    if head < heads + groups:
        if NORM:
            square = tl.sum(a * a + b * b, 0)
            if REST > 0:
                square += tl.sum(rest * rest, 0)
            rstd = tl.rsqrt(square / size + eps)
            weight_ptr = q_norm_ptr if head < heads else k_norm_ptr
            a = _normed(a, rstd, tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32), dtype, UNIT_OFFSET)
            b = _normed(
                b, rstd, tl.load(weight_ptr + half + column, inside, other=0.0).to(tl.float32), dtype, UNIT_OFFSET
            )
            if REST > 0:
                weight = tl.load(weight_ptr + 2 * half + behind, beyond, other=0.0).to(tl.float32)
                rest = _normed(rest, rstd, weight, dtype, UNIT_OFFSET)
        cos = tl.load(cos_ptr + token * 2 * half + column, inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * 2 * half + column, inside, other=0.0).to(tl.float32)
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    if head < heads:
        target = q_ptr + (token * heads + head) * size
    elif head < heads + groups:
        target = k_ptr + row * k_row + (head - heads).to(tl.int64) * k_head + place * k_place
    else:
        target = v_ptr + row * v_row + (head - heads - groups).to(tl.int64) * v_head + place * v_place
        a, b = a * value_scale, b * value_scale
        if REST > 0:
            rest *= value_scale
    tl.store(target + column, a.to(dtype), inside)
    tl.store(target + half + column, b.to(dtype), inside)
    if REST > 0:
        tl.store(target + 2 * half + behind, rest.to(dtype), beyond)


@triton.jit
def _normed(x, rstd, weight, dtype: tl.constexpr, UNIT_OFFSET: tl.constexpr):
    """Rounded where `gpu.rms_norm` rounds."""
    y = x * rstd * (1.0 + weight) if UNIT_OFFSET else (x * rstd).to(dtype).to(tl.float32) * weight
    return y.to(dtype).to(tl.float32)
