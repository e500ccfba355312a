"""``x W^T`` for up to 16 rows of ``x`` on tensor cores, W read once as it is stored and decoded in registers.

What bounds few rows is not memory alone: an H200 has time for about eight instructions a 4-bit weight before memory
would wait. This takes three; what threads look up, load and exchange by way of shared memory's banks is the most of its
time (docs/benchmarks/h200.md). How is `gpu.few_rows_operands`'s.

Shapes: M rows of ``x``, N rows and K columns of W, R ranks. A program has ROWS rows of W; its WARPS share the columns,
each taking UNITS of 128 at a time, or as many as SLICES beside each other.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.dependent import await_inputs, let_next_begin, overlaps
from jebi.kernels.gpu.few_rows_before import Laid
from jebi.kernels.gpu.few_rows_epilogue import (
    Epilogue,
    activated,
    adapter,
    epilogue_arguments,
    epilogue_constants,
    share,
)
from jebi.kernels.gpu.few_rows_operands import (
    along,
    canonical,
    levels_held,
    levels_of,
    loads_before_this,
    order,
    places,
    row_of,
    rows_of,
    scale_at,
    sums_of,
    weight_at,
    x_at,
)
from jebi.kernels.gpu.launch import launch

DENSE, INT8, NF4 = range(3)
MOST = 16
"""Rows of ``x``."""
_ROOMY = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities whose multiprocessors have 164 KiB of shared memory and more (CUDA programming guide)."""


@dataclass(frozen=True)
class Stored:
    """A weight as the kernels take it."""

    kind: int
    weight: Tensor
    """``DENSE``: (N, K) contiguous. ``INT8``: int8, N * K. ``NF4``: the packed bytes as int32."""
    scales_BN: Tensor
    """(K / 64, N), float32; of a dense weight anything."""
    levels: Tensor | None
    """The 16 of ``NF4``, float32."""
    shape: tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """What a program has."""

    rows: int
    """A multiple of 16."""
    warps: int
    """Each has its share of the columns."""
    units: int
    """Of 128 columns, or of two slices of 128, that a warp reads at once."""


def tile_of(stored: Stored, tokens: int) -> Tile:
    """How a product is cut, by its form and shape: an H200's best of some tens (`benchmarks/few_rows.py`)."""
    outputs, columns = stored.shape
    if stored.kind != NF4:
        return _tile_of_bytes(stored.kind, outputs, tokens)
    if tokens <= 2:
        return Tile(16, 4 if outputs > 4096 else 8, 1)
    if tokens <= 4:
        return Tile(32, 4, 1) if outputs > 8192 else Tile(16, 4 if outputs > 4096 else 8, 2)
    if outputs > 8192:
        return Tile(32, 2, 1)
    return Tile(16, 4, 1) if outputs > 4096 else Tile(16, 8, 1) if columns > 8192 else Tile(16, 4, 2)


def _tile_of_bytes(kind: int, outputs: int, tokens: int) -> Tile:
    """Of weights of 8 and 16 bits, which are bound by memory: more in flight, in more warps."""
    if outputs <= 4096:
        return Tile(16, 8, 2)
    if kind == DENSE:
        return Tile(32, 4, 1) if tokens > 4 else Tile(16, 4, 2)
    if outputs <= 8192:
        return Tile(16, 4 if tokens > 4 else 8, 2)
    return Tile(32, 4, 1) if tokens > 4 else Tile(32, 2, 2)


def product(
    x: Tensor | Laid,
    stored: Stored,
    after: Epilogue,
    out_MN: Tensor,
    tile: Tile | None = None,
    dots: bool | None = None,
) -> None:
    """Write the product into ``out_MN``, (M, N) or with an activation (M, N / 2).

    Args:
        x: at most `MOST` rows, each contiguous and starting at a multiple of eight numbers; or as they are laid.
        stored: K a multiple of 64 unless it is dense, of 8 then.
        after: residual of the output's shape; matrices contiguous within a row.
        out_MN: may be the residual itself; contiguous within a row.
        tile: other than `tile_of`'s, for measuring.
        dots: other than `by_dots`, for testing.
    """
    tokens, (outputs, columns) = out_MN.shape[0], stored.shape
    assert tokens <= MOST
    assert not isinstance(x, Tensor) or tokens == 1 or x.stride(0) % 8 == 0
    values, laid = (x, 0) if isinstance(x, Tensor) else (x.values, x.values.shape[1])
    tile, dots = tile or tile_of(stored, tokens), by_dots(values) if dots is None else dots
    launch(
        _product, (triton.cdiv(outputs, tile.rows), 1 if dots else tokens),
        values, stored.weight, stored.scales_BN, values if stored.levels is None else stored.levels,
        *epilogue_arguments(after, values, out_MN), values.stride(0), tokens, outputs,
        COLUMNS=columns, KIND=stored.kind, **epilogue_constants(after), LEVELS=levels_by(values),
        **overlap(stored), DOTS=dots, LAID=laid, **order(stored.kind), M=padded(tokens, stored.kind) if dots else 1,
        ROWS=tile.rows, WARPS=tile.warps, UNITS=tile.units, num_warps=tile.warps,
    )  # fmt: skip


def levels_by(x: Tensor) -> int:
    """How 4-bit levels are looked up: 0 in memory, 1 by shuffles, 2 in a table of 32 KiB of shared memory.

    Where a multiprocessor has 100 KiB (8.6, 8.9, 12.0) or 64 (7.5) that would leave room for two programs or one, and
    cards without dots would fill a table for each row of ``x``. Neither is measured there.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        return 0
    return 2 if torch.cuda.get_device_capability(x.device) in _ROOMY else 1


def padded(tokens: int, kind: int) -> int:
    """Rows of ``x`` for tensor cores: eight columns of sums at least, of which quantised weights take two a row."""
    return max((8, 4, 2)[kind], int(triton.next_power_of_2(tokens)))


def by_dots(x_MK: Tensor) -> bool:
    """Whether tensor cores take the product. Triton knows them from Ampere on, and float32 would be rounded there.

    Otherwise a program has one row of ``x``.
    """
    if x_MK.is_cuda and torch.cuda.get_device_capability(x_MK.device) < (8, 0):
        return False
    return x_MK.dtype != torch.float32


def overlap(stored: Stored) -> dict[str, bool]:
    """How a product is launched: its first weights may be read before its input is there.

    Larger ones are not, and programs that only wait lie unevenly over the multiprocessors: a token of Llama 8B's shape
    in 16 bits took 10.8 ms instead of 6.8.
    """
    early = stored.kind == NF4 and overlaps(stored.weight)
    return {"OVERLAP": early, "launch_pdl": early}


@triton.jit(do_not_specialize=["tokens", "rank"])
def _product(
    x_ptr, weight_ptr, scales_ptr, levels_ptr, bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
    left_stride, right_stride, residual_stride, out_stride, rank, scale, x_stride, tokens, outputs,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, EIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr, OVERLAP: tl.constexpr,
    LAST_FIRST: tl.constexpr, ORDER: tl.constexpr, DOTS: tl.constexpr, LAID: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    MAPS: tl.constexpr = 2 if ACTIVATION >= 0 else 1
    PAIRS: tl.constexpr = DOTS and KIND > 0
    N: tl.constexpr = 8 if PAIRS and M <= 4 else M
    SLICES: tl.constexpr = N // (2 * M) if N > M else 1
    AT_ONCE: tl.constexpr = 128 * SLICES * WARPS * UNITS
    EACH: tl.constexpr = (COLUMNS + AT_ONCE - 1) // AT_ONCE * UNITS
    EVEN: tl.constexpr = COLUMNS % AT_ONCE == 0
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0)
    if OVERLAP:
        let_next_begin()
    quarter, eight, eighth = along(4, 0, LAST_FIRST), along(8, 1, LAST_FIRST), along(ROWS * SLICES // 8, 4, LAST_FIRST)
    four, value = along(4, 5, LAST_FIRST), along(8, 6, LAST_FIRST)
    w_row = row_of(row, (eighth * 8 + eight) // SLICES, outputs, ROWS, ACTIVATION).to(tl.int64)
    unit = along(WARPS, 2, LAST_FIRST) * EACH + along(UNITS, 3, LAST_FIRST)
    x_row, x_there, x_unit, block = places(unit, quarter, eight, tokens, DOTS, M, N, SLICES, LAST_FIRST)
    w_unit = unit * SLICES + eight % SLICES
    if KIND == 2:
        # Words and their scales are read a turn ahead, and those of the first turn before the input is there. Of larger
        # values that takes four times the registers.
        weight = weight_at(weight_ptr, w_row, w_unit, quarter, four, value, True, COLUMNS, KIND, EVEN)
        scales = scale_at(scales_ptr, w_row, block, True, outputs, COLUMNS, EVEN)
        held = levels_held(levels_ptr, dtype, WARPS, LEVELS)
    token, found = tl.program_id(1) + tl.arange(0, M), row_of(row, tl.arange(0, ROWS), outputs, ROWS, ACTIVATION)
    column = row * (ROWS // MAPS) + tl.arange(0, ROWS // MAPS)
    inside = (column < outputs // MAPS)[:, None] & (token < tokens)[None]
    if OVERLAP:
        await_inputs()
    # What comes after the product is read first; an adapter's for the eight rows of x that tensor cores want.
    if RANK > 0:
        tall = tl.program_id(1) + tl.arange(0, 8 if N > M else M)
        right, left = adapter(left_ptr, right_ptr, left_stride, right_stride, tall, tokens, found, 0, rank, RANK, EIGHT)
    if RESIDUAL:
        residual = tl.load(residual_ptr + token[None] * residual_stride + column[:, None], inside, other=0.0)

    total = tl.zeros((WARPS, ROWS * SLICES, N), tl.float32) if DOTS else tl.zeros((4, 8, WARPS, ROWS // 8), tl.float32)
    for start in tl.range(0, EACH, UNITS, num_stages=1):
        x = x_at(
            x_ptr, x_row, x_stride, x_unit + start * SLICES, quarter, four, x_there, COLUMNS, PAIRS, LAID, LAST_FIRST,
            EVEN,
        )  # fmt: skip
        if KIND == 2:
            more, ahead = start + UNITS < EACH, (start + UNITS) * SLICES
            loads_before_this(LEVELS == 2)
            next_weight = weight_at(weight_ptr, w_row, w_unit + ahead, quarter, four, value, more, COLUMNS, KIND, EVEN)
            next_scales = scale_at(scales_ptr, w_row, block + 2 * ahead, more, outputs, COLUMNS, EVEN)
            loads_before_this(LEVELS == 2)
            weight = levels_of(weight, levels_ptr, held, dtype, LEVELS)
        else:
            weight = weight_at(weight_ptr, w_row, w_unit + start, quarter, four, value, True, COLUMNS, KIND, EVEN)
            if KIND == 1:
                scales = scale_at(scales_ptr, w_row, block + 2 * start, True, outputs, COLUMNS, EVEN)
        total += sums_of(
            canonical(weight.to(dtype), LAST_FIRST), canonical(x, LAST_FIRST),
            canonical(scales, LAST_FIRST) if KIND > 0 else 0, ORDER, DOTS, PAIRS, N,
        )  # fmt: skip
        if KIND == 2:
            weight, scales = next_weight, next_scales

    y = rows_of(total, DOTS, M, SLICES)
    if BIAS:
        y += tl.load(bias_ptr + found).to(tl.float32)[:, None]
    if RANK > 0:
        y += share(
            right, left, left_ptr, right_ptr, left_stride, right_stride, tall, tokens, found, rank, RANK, EIGHT, M,
            LEVELS > 0,
        )  # fmt: skip
    if ACTIVATION >= 0:
        y = activated(y, scale, dtype, M, ROWS, ACTIVATION)
    if RESIDUAL:
        y += residual.to(tl.float32)
    tl.store(out_ptr + token[None] * out_stride + column[:, None], y.to(out_ptr.dtype.element_ty), inside)
