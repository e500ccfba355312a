"""``x W^T`` for up to 16 rows of ``x``, W read once as it is stored: by sums in registers, for the fewest rows.

Its tensor-core form is `gpu.few_rows_dot`, which shares the epilogue. What bounds one row is not memory alone: an H100
has time for about seven instructions a 4-bit weight. So a word of eight levels is read by shuffles, one shift and one
shuffle a level: each lane holds level ``lane % 16`` and the shuffle looks at four bits only. (PTX ISA, ``shfl.sync``.)
Everything else is shared: scales by 8 C values of a lane, ``x`` by all rows of W in a program.

Shapes: M rows of ``x``, N rows and K columns of W, R ranks, L lanes of a program, C words of eight levels a lane (or V
values). A program has ROWS rows of W and all of K, lanes along K.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.dependent import await_inputs, fetch, let_next_begin, overlaps

DENSE, INT8, NF4 = range(3)


@dataclass(frozen=True)
class Stored:
    """A weight as the kernels take it."""

    kind: int
    weight: Tensor
    """``DENSE``: (N, K) contiguous. ``INT8``: int8, N * K. ``NF4``: the packed bytes as int32."""
    scales: Tensor
    """A block of 64 has one: float32, or ``NF4``'s uint8 codes; of a dense weight anything."""
    nested: Tensor | None
    """``NF4`` with double quantisation: float32, one a block of 256 codes."""
    offsets: Tensor | None
    """Added to the scales, one a block of 256 codes."""
    tables: tuple[Tensor, Tensor] | None
    """The 16 levels and the 256 codes of the scales, float32."""
    shape: tuple[int, int]


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the product before it is stored; in this order, and in float32."""

    bias_N: Tensor | None = None
    left_MR: Tensor | None = None
    """``left right^T`` is added: an adapter's share."""
    right_NR: Tensor | None = None
    activation: int | None = None
    """W is gate above up: what is stored is ``act(gate) * up * scale``. 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    scale: float = 1.0
    residual_MN: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """What a program of the vector kernel has."""

    rows: int
    words: int
    """C: words of 4 bytes that a lane reads at once, at most 4; at most 2 of int8, a load of ``x`` having 8 values."""
    warps: int


MOST = 4
"""Rows of ``x`` in one program; more take several programs, which find W in the cache."""


def tile_of(stored: Stored, tokens: int) -> Tile:
    """How a product is cut, by its shape."""
    warps = 4 if stored.shape[1] >= 8192 or stored.kind != NF4 else 2
    words = 2 if stored.kind == INT8 or (stored.kind == NF4 and tokens > 2) else 4
    return Tile(8 if stored.shape[0] > 8192 and tokens <= 2 else 4, words, warps)


def product(x_MK: Tensor, stored: Stored, after: Epilogue, out_MN: Tensor, tile: Tile | None = None) -> None:
    """Write the product into ``out_MN``, (M, N) or with an activation (M, N / 2).

    Args:
        x_MK: contiguous within a row, starting at a multiple of 16 bytes.
        stored: K a multiple of 64 unless it is dense, of 8 then.
        after: residual of the output's shape; matrices contiguous within a row.
        out_MN: may be the residual itself; contiguous within a row.
        tile: other than `tile_of`'s, for measuring.
    """
    tokens, outputs = x_MK.shape[0], stored.shape[0]
    tile = tile or tile_of(stored, tokens)
    rows = min(MOST, triton.next_power_of_2(tokens))
    # Programs of the same rows of W follow each other, so that only the first reads them from memory.
    _vector[(triton.cdiv(tokens, rows) * triton.cdiv(outputs, tile.rows),)](
        x_MK, *weight_arguments(stored, x_MK), *epilogue_arguments(after, x_MK, out_MN),
        x_MK.stride(0), tokens, outputs,
        COLUMNS=stored.shape[1], KIND=stored.kind, **epilogue_constants(after), NESTED=stored.nested is not None,
        SHUFFLE=x_MK.is_cuda, **overlap(stored), M=rows, ROWS=tile.rows, LANES=32 * tile.warps, WORDS=tile.words,
        num_warps=tile.warps,
    )  # fmt: skip


def overlap(stored: Stored) -> dict[str, bool]:
    """How a product is launched: its weights may be fetched before its input is there."""
    early = overlaps(stored.weight) and stored.weight.data_ptr() % 16 == 0
    return {"OVERLAP": early, "launch_pdl": early}


def weight_arguments(stored: Stored, absent: Tensor) -> tuple[Tensor, ...]:
    """A weight's tensors in a kernel's order; ``absent`` stands for what there is not."""
    levels, codes = stored.tables or (absent, absent)
    nested = absent if stored.nested is None else stored.nested
    offsets = absent if stored.offsets is None else stored.offsets
    return stored.weight, stored.scales, nested, offsets, levels, codes


def epilogue_arguments(after: Epilogue, absent: Tensor, out_MN: Tensor) -> tuple[object, ...]:
    """An epilogue's tensors, strides and sizes in a kernel's order."""
    bias, left, right, residual = (
        absent if part is None else part for part in (after.bias_N, after.left_MR, after.right_NR, after.residual_MN)
    )
    rank = 0 if after.left_MR is None else after.left_MR.shape[1]
    strides = left.stride(0), right.stride(0), residual.stride(0), out_MN.stride(0)
    return bias, left, right, residual, out_MN, *strides, rank, after.scale


def epilogue_constants(after: Epilogue) -> dict[str, int | bool]:
    """An epilogue's compile-time constants."""
    return {
        "BIAS": after.bias_N is not None,
        "RANK": 0 if after.left_MR is None else min(64, max(16, triton.next_power_of_2(after.left_MR.shape[1]))),
        "ACTIVATION": -1 if after.activation is None else after.activation,
        "RESIDUAL": after.residual_MN is not None,
    }


@triton.jit
def row_of(row, outputs, ROWS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rows of W of one program, clamped: half of them of the gate and half of up where there is an activation."""
    if ACTIVATION >= 0:
        half = outputs // 2
        first = tl.minimum(row * (ROWS // 2) + tl.arange(0, ROWS) % (ROWS // 2), half - 1)
        found = first + tl.arange(0, ROWS) // (ROWS // 2) * half
    else:
        found = tl.minimum(row * ROWS + tl.arange(0, ROWS), outputs - 1)
    return found


@triton.jit
def fetch_rows(
    weight_ptr, row, outputs, COLUMNS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr
):
    """Begin to fetch a program's rows of W: in one piece, or gate's and up's in two."""
    ELEMENTS: tl.constexpr = COLUMNS // (8 if KIND == 2 else 1)
    PIECE: tl.constexpr = ROWS // HALVES
    size: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    most = outputs // HALVES
    first = tl.minimum(row * PIECE, most - 1)
    count = tl.minimum(PIECE, most - first)
    for half in tl.static_range(HALVES):
        start = (half * most + first).to(tl.int64) * ELEMENTS
        fetch(weight_ptr + start, count * (ELEMENTS * size))


@triton.jit
def finish(
    y, token, found, row, bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
    left_stride, right_stride, residual_stride, out_stride, rank, scale, tokens, outputs,
    BIAS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add to ``y`` (M, ROWS) what is to be added, and store it."""
    dtype = out_ptr.dtype.element_ty
    here = token < tokens
    if BIAS:
        y += tl.load(bias_ptr + found).to(tl.float32)[None]
    if RANK > 0:
        for start in tl.range(0, rank, RANK, num_stages=1):
            index = start + tl.arange(0, RANK)
            left = tl.load(
                left_ptr + token[:, None] * left_stride + index, here[:, None] & (index < rank)[None], other=0.0
            ).to(tl.float32)
            right = tl.load(
                right_ptr + found.to(tl.int64)[:, None] * right_stride + index, (index < rank)[None], other=0.0
            ).to(tl.float32)
            if M >= 16:
                y += tl.dot(left, tl.trans(right), input_precision="ieee")
            else:
                y += tl.sum(left[:, None, :] * right[None, :, :], 2)
    if ACTIVATION >= 0:
        gate, up = tl.split(tl.permute(tl.reshape(y, (M, 2, ROWS // 2)), (0, 2, 1)))
        # Each rounded where a plain layer rounds: the products, then the activation.
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        if ACTIVATION == 0:
            act = gate / (1.0 + tl.exp(-gate))
        elif ACTIVATION == 1:
            act = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
        else:
            act = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        y = act.to(dtype).to(tl.float32) * scale * up
        column = row * (ROWS // 2) + tl.arange(0, ROWS // 2)
        inside = here[:, None] & (column < outputs // 2)[None]
    else:
        column = row * ROWS + tl.arange(0, ROWS)
        inside = here[:, None] & (column < outputs)[None]
    if RESIDUAL:
        y += tl.load(residual_ptr + token[:, None] * residual_stride + column[None], inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token[:, None] * out_stride + column[None], y.to(dtype), inside)


@triton.jit
def scale_of(block, inside, scales_ptr, nested_ptr, offsets_ptr, codes_ptr, NESTED: tl.constexpr):
    """Scales of these blocks of 64, float32; `quant.nf4` says what they are made of."""
    scale = tl.load(scales_ptr + block, inside, other=0)
    if NESTED:
        nested = tl.load(nested_ptr + block // 256, inside, other=0.0)
        offset = tl.load(offsets_ptr + block // 256, inside, other=0.0)
        scale = tl.load(codes_ptr + scale.to(tl.int32)) * nested + offset
    return scale


@triton.jit
def levels_of(words, levels_ptr, SHUFFLE: tl.constexpr):
    """The eight levels of each word, float32, lowest bits first: values 1, 0, 3, 2, 5, 4, 7, 6 of its eight."""
    if SHUFFLE:
        own = tl.inline_asm_elementwise(
            "{ .reg .u32 t; .reg .u64 a; mov.u32 t, %laneid; and.b32 t, t, 15; mul.wide.u32 a, t, 4; add.u64 a, a, $1; "
            "ld.global.nc.b32 $0, [a]; }",
            "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        # 0x101f: within 16 lanes, by the four lowest bits of the third operand.
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t; "
            "shfl.sync.idx.b32 $0, $9, $8, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 4; shfl.sync.idx.b32 $1, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 8; shfl.sync.idx.b32 $2, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 12; shfl.sync.idx.b32 $3, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 16; shfl.sync.idx.b32 $4, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 20; shfl.sync.idx.b32 $5, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 24; shfl.sync.idx.b32 $6, $9, t, 0x101f, 0xffffffff; "
            "shr.u32 t, $8, 28; shfl.sync.idx.b32 $7, $9, t, 0x101f, 0xffffffff; }",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words, own],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = (
            tl.load(levels_ptr + (words & 15)), tl.load(levels_ptr + ((words >> 4) & 15)),
            tl.load(levels_ptr + ((words >> 8) & 15)), tl.load(levels_ptr + ((words >> 12) & 15)),
            tl.load(levels_ptr + ((words >> 16) & 15)), tl.load(levels_ptr + ((words >> 20) & 15)),
            tl.load(levels_ptr + ((words >> 24) & 15)), tl.load(levels_ptr + ((words >> 28) & 15)),
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["tokens", "rank"])
def _vector(
    x_ptr, weight_ptr, scales_ptr, nested_ptr, offsets_ptr, levels_ptr, codes_ptr,
    bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
    left_stride, right_stride, residual_stride, out_stride, rank, scale, x_stride, tokens, outputs,
    COLUMNS: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, OVERLAP: tl.constexpr,
    M: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(tokens, M)
    row = tl.program_id(0) // parts
    if OVERLAP:
        let_next_begin()
        fetch_rows(weight_ptr, row, outputs, COLUMNS, KIND, ROWS, 2 if ACTIVATION >= 0 else 1)
        await_inputs()
    found = row_of(row, outputs, ROWS, ACTIVATION)
    token = tl.program_id(0) % parts * M + tl.arange(0, M)
    here = token < tokens
    lane = tl.arange(0, LANES)
    x_row = token[:, None].to(tl.int64) * x_stride
    total = tl.zeros((M, ROWS, LANES), tl.float32)
    if KIND == 2:
        word = tl.arange(0, WORDS)
        for start in range(0, COLUMNS // 8, LANES * WORDS):
            # A lane's words lie side by side, so that it reads them at once and they share a scale.
            first = start + lane * WORDS
            place = first[None, :] + word[:, None]
            inside = first < COLUMNS // 8
            words = tl.load(
                weight_ptr + found.to(tl.int64)[:, None, None] * (COLUMNS // 8) + place[None],
                inside[None, None], other=0,
            )  # fmt: skip
            value = tl.arange(0, 8)
            x = tl.load(
                x_ptr + x_row[:, :, None, None] + place[None, :, :, None] * 8 + value[None, None, None, :],
                here[:, None, None, None] & inside[None, None, :, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
            even, odd = tl.split(tl.reshape(x, (M, WORDS, LANES, 4, 2)))
            x04, x26 = tl.split(tl.reshape(even, (M, WORDS, LANES, 2, 2)))
            x15, x37 = tl.split(tl.reshape(odd, (M, WORDS, LANES, 2, 2)))
            x0, x4 = tl.split(x04)
            x2, x6 = tl.split(x26)
            x1, x5 = tl.split(x15)
            x3, x7 = tl.split(x37)
            w1, w0, w3, w2, w5, w4, w7, w6 = levels_of(words, levels_ptr, SHUFFLE)
            part = w0[None] * x0[:, None]
            part += w1[None] * x1[:, None]
            part += w2[None] * x2[:, None]
            part += w3[None] * x3[:, None]
            part += w4[None] * x4[:, None]
            part += w5[None] * x5[:, None]
            part += w6[None] * x6[:, None]
            part += w7[None] * x7[:, None]
            block = found.to(tl.int64)[:, None] * (COLUMNS // 64) + (first // 8)[None]
            scales = scale_of(block, inside[None], scales_ptr, nested_ptr, offsets_ptr, codes_ptr, NESTED)
            total += tl.sum(part, 2) * scales[None]
    else:
        VALUES: tl.constexpr = WORDS * 4 // (2 if KIND == 0 else 1)
        value = tl.arange(0, VALUES)
        for start in range(0, COLUMNS, LANES * VALUES):
            first = start + lane * VALUES
            place = first[None, :] + value[:, None]
            inside = first < COLUMNS
            weight = tl.load(
                weight_ptr + found.to(tl.int64)[:, None, None] * COLUMNS + place[None], inside[None, None], other=0
            ).to(tl.float32)
            x = tl.load(
                x_ptr + x_row[:, :, None] + place[None], here[:, None, None] & inside[None, None], other=0.0
            ).to(tl.float32)  # fmt: skip
            part = tl.sum(weight[None] * x[:, None], 2)
            if KIND == 1:
                block = found.to(tl.int64)[:, None] * (COLUMNS // 64) + (first // 64)[None]
                part *= tl.load(scales_ptr + block, inside[None], other=0.0)[None]
            total += part
    finish(
        tl.sum(total, 2), token, found, row, bias_ptr, left_ptr, right_ptr, residual_ptr, out_ptr,
        left_stride, right_stride, residual_stride, out_stride, rank, scale, tokens, outputs,
        BIAS, RANK, ACTIVATION, RESIDUAL, M, ROWS,
    )  # fmt: skip
