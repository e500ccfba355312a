"""What a program of `gpu.few_rows` reads of W and of ``x``, in the order in which tensor cores take it.

Nothing may be exchanged between threads on the way there: that costs more than all the rest. A matrix product takes any
order of its columns, if ``x`` has the same. So each lane multiplies the 32 neighbouring values that it has read of 128
columns, where the tensor cores expect columns that lie apart; and tensors have their dimensions in the order in which
Triton deals them to lanes, warps and registers, so that what is read lies as an operand does. Levels come two at a time
out of a table of all bytes, or one by one: each lane holds level ``lane % 16``. (PTX ISA, ``ld.shared``,
``shfl.sync`` and ``mma.m16n8k16``.)

128 columns have two scales a row, and one product adds them up. So ``x`` comes twice, with zeros in the second 64
columns and in the first: side by side where it has four rows at most, as tensor cores have room for eight.

Where it has two, there is room for two SLICES as well: eight lanes of a row's 4-bit weights instead of four read 128
neighbouring bytes, a whole cache line (read by halves, 59 MB took 23 us instead of 17). Tensor cores take the slices of
a row as rows; of what these make with the slices of ``x`` half is left out.

Seven dimensions: 0 the quarters of 128 columns (lanes), 1 eight rows, or four and their slices (lanes), 2 WARPS, 3
UNITS, 4 ROWS * SLICES / 8, 5 and 6 the 4 x 8 values of a lane.
"""

import triton
import triton.language as tl


def order(kind: int) -> dict[str, int | bool]:
    """In which order Triton deals dimensions to lanes, and which columns a lane of the tensor cores has.

    Another order is right too, but exchanges everything through shared memory: 3 to 6 instructions a weight and ten
    barriers a turn. Seen in what 3.6, 3.7, 3.8 and 3.9 compile to; a test counts the barriers.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return {"LAST_FIRST": version >= (3, 7), "ORDER": (0, 1, 0 if version >= (3, 8) else 2)[kind]}


@triton.jit
def along(size: tl.constexpr, axis: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The numbers from 0 along one of the seven dimensions."""
    at: tl.constexpr = 5 - axis if LAST_FIRST and axis < 6 else axis
    # By expanding: Triton does not see through a reshape which numbers are neighbours.
    numbers = tl.arange(0, size)
    for _ in tl.static_range(at):
        numbers = tl.expand_dims(numbers, 0)
    for dimension in tl.static_range(at + 1, 7):
        numbers = tl.expand_dims(numbers, dimension)
    return numbers


@triton.jit
def canonical(values, LAST_FIRST: tl.constexpr):
    """The seven dimensions in the order named above."""
    return tl.permute(values, (5, 4, 3, 2, 1, 0, 6)) if LAST_FIRST else values


@triton.jit
def operand(values, ORDER: tl.constexpr):
    """What lanes have read, as a left operand: (UNITS * WARPS, rows, 128). Of ``x`` its transpose is the right one.

    A lane of the tensor cores has two neighbouring columns, or four where Triton thinks of packed numbers.
    """
    WARPS: tl.constexpr = values.shape[2]
    UNITS: tl.constexpr = values.shape[3]
    ROWS: tl.constexpr = values.shape[4] * 8
    values = tl.reshape(values, (4, 8, WARPS, UNITS, ROWS // 8, 2, 2, 2, 2, 2))
    if ORDER == 0:
        values = tl.permute(values, (3, 2, 4, 1, 5, 6, 7, 8, 0, 9))
    elif ORDER == 1:
        values = tl.permute(values, (3, 2, 4, 1, 5, 6, 7, 0, 8, 9))
    else:
        values = tl.permute(values, (3, 2, 4, 1, 5, 7, 8, 0, 6, 9))
    return tl.reshape(values, (UNITS * WARPS, ROWS, 128))


@triton.jit
def multiplied(weight, x, ORDER: tl.constexpr):
    """The product (UNITS * WARPS, ROWS, N) of two that lanes have read."""
    return tl.dot(operand(weight, ORDER), tl.permute(operand(x, ORDER), (0, 2, 1)), input_precision="ieee")


@triton.jit
def over_sums(scales, N: tl.constexpr):
    """Scales (4, 8, WARPS, UNITS, ROWS / 8) as factors of a product's sums (UNITS * WARPS, ROWS, N).

    A quarter has two of eight columns of the sums.
    """
    shape: tl.constexpr = scales.shape
    scales = tl.expand_dims(tl.expand_dims(scales, 5), 6)
    scales = tl.broadcast_to(scales, (4, 8, shape[2], shape[3], shape[4], N // 8, 2))
    return tl.reshape(tl.permute(scales, (3, 2, 4, 1, 5, 0, 6)), (shape[3] * shape[2], shape[4] * 8, N))


@triton.jit
def row_of(row, number, outputs, ROWS: tl.constexpr, ACTIVATION: tl.constexpr):
    """W's rows with these numbers of a program, clamped: half are the gate's and half up's where both are there."""
    if ACTIVATION >= 0:
        half = outputs // 2
        found = tl.minimum(row * (ROWS // 2) + number % (ROWS // 2), half - 1) + number // (ROWS // 2) * half
    else:
        found = tl.minimum(row * ROWS + number, outputs - 1)
    return found


@triton.jit
def places(
    unit, quarter, eight, tokens, DOTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SLICES: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Which rows of ``x`` a lane reads, which 128 of their columns, whether for its sums, and the blocks of its scales.

    Sums of a lane of quarter q are those of the columns 2 q and 2 q + 1.
    """
    if N > M:
        # Columns of the sums: slices, in each of these the first 64 columns of 128 and the second, in each rows of x.
        column = along(1, 4, LAST_FIRST) * 8 + eight
        x_row, x_there, x_unit = column % M, column // M % 2 == quarter // 2, unit * SLICES + column // (2 * M)
        block = (unit * SLICES + quarter // M) * 2 + quarter * 2 // M % 2
    elif DOTS:
        x_row, x_there, x_unit = along(N // 8, 4, LAST_FIRST) * 8 + eight, True, unit
        block = unit * 2 + along(2, 5, LAST_FIRST) + quarter * 0
    else:
        x_row, x_there, x_unit, block = tl.program_id(1), True, unit, unit * 2 + quarter // 2
    return x_row, x_there & (x_row < tokens), x_unit, block


@triton.jit
def x_at(
    x_ptr, x_row, x_stride, unit, quarter, four, there, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
    LAID: tl.constexpr, LAST_FIRST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of ``x``, or PAIRS of numbers of 16 bits in an int32, as which they are chosen between at once.

    LAID is the number of rows of `few_rows_before.Laid`; 0 for rows as they come.
    """
    inside = there if EVEN else ((unit * 128 + quarter * 32 + four * 8) < COLUMNS) & there
    if LAID > 0:
        first = (unit * 4 + four) * (LAID * 32) + x_row * 32 + quarter * 8
    else:
        first = x_row * (x_stride // 8 * 8) + unit * 128 + quarter * 32 + four * 8  # Said as `adapter` says it.
    if PAIRS:
        pointer = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        x = tl.load(pointer + (first // 2 + along(4, 6, LAST_FIRST)), inside, other=0)
    else:
        x = tl.load(x_ptr + (first + along(8, 6, LAST_FIRST)), inside, other=0.0)
    return x


@triton.jit
def numbers(pairs, dtype: tl.constexpr):
    """The numbers that `x_at` has read in pairs; (..., 8)."""
    shape: tl.constexpr = pairs.shape
    both = halves(pairs).to(dtype, bitcast=True)
    return tl.reshape(both, (shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], 8))


@triton.jit
def halves(pairs):
    """Both 16 bits of each int32, the lower ones first, in one more dimension."""
    return tl.join((pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16))


@triton.jit
def weight_at(
    weight_ptr, w_row, unit, quarter, four, value, there, COLUMNS: tl.constexpr, KIND: tl.constexpr, EVEN: tl.constexpr
):
    """W as it is stored: values, or words of eight levels with a last dimension of one.

    EVEN says that tiles have no columns beyond W's. What is not ``there`` then is anything.
    """
    place = unit * 128 + quarter * 32
    if KIND == 2:
        # Triton sees through this, not through a division or another condition for each word, that four are neighbours.
        word = unit * 16 + quarter * 4 + four
        pointer = weight_ptr + w_row * (COLUMNS // 8) + word
    else:
        place += four * 8
        pointer = weight_ptr + w_row * COLUMNS + (place + value)
    # Nothing reads them again, which is worth 2 % of 4 bits at 16 rows and a tenth of 8. Of 16 a lane has two sectors
    # in four pieces, and what goes first is gone before its other half is read: 235 MB as 408, in 108 us instead of 62.
    POLICY: tl.constexpr = "evict_first" if KIND > 0 else ""
    if EVEN:
        return tl.load(pointer, there, eviction_policy=POLICY)
    else:
        return tl.load(pointer, (place < COLUMNS) & there, other=0, eviction_policy=POLICY)


@triton.jit
def scale_at(scales_ptr, w_row, block, there, outputs, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Scales of these blocks of 64, float32."""
    # W's neighbouring rows go to other lanes: what lies side by side must not decide about lanes.
    index = tl.max_contiguous(block * outputs + w_row.to(tl.int32), [1, 1, 1, 1, 1, 1, 1])
    pointer = scales_ptr + index
    return tl.load(pointer, there) if EVEN else tl.load(pointer, (block * 64 < COLUMNS) & there, other=0.0)


@triton.jit
def levels_held(levels_ptr, dtype: tl.constexpr, WARPS: tl.constexpr, LEVELS: tl.constexpr):
    """What a lane looks levels up by, in an int32: its own level, ``lane % 16``; or its place in a table, made here.

    Byte b's two levels are at 128 b, 32 times, so that no two lanes of a warp ever meet in a bank. 32 KiB.
    """
    if LEVELS > 0:
        own = own_level(levels_ptr).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    if LEVELS == 2:
        # Eight threads write a byte's, 16 bytes each: where each thread begins, and with which byte. Turns differ in
        # the byte's upper half, and where they are of 8 bytes every other in the lower one.
        place, byte = tl.inline_asm_elementwise(
            ".shared .align 128 .b32 pairs[8192]; "
            "mov.u32 $1, %tid.x; shl.b32 $0, $1, 4; shr.u32 $1, $1, 3; "
            "{ .reg .u32 t; mov.u32 t, pairs; add.u32 $0, $0, t; }",
            "=&r,=&r", [], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
        lower = level_of(own, byte)
        other = level_of(own, byte + 8) if WARPS == 2 else lower
        for turn in tl.static_range(64 // WARPS):
            tl.inline_asm_elementwise(
                "{ .reg .b32 x; prmt.b32 x, $2, $3, 0x5410; mov.b32 $0, x; st.shared.v4.b32 [$1], {x, x, x, x}; }",
                "=&r,r,r,r",
                [
                    place + turn * WARPS * 512,
                    level_of(own, byte // 16 + turn * WARPS // 4),
                    lower if turn % 2 == 0 else other,
                ],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        held = tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, %laneid; shl.b32 $0, $0, 2;", "=&r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        held = own if LEVELS == 1 else 0
    return held


@triton.jit
def level_of(own, number):
    """Level ``number % 16``, of which lanes hold their ``own``. 0x101f: within 16 lanes, by a number's lowest bits."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=r,r,r", [own, number],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def own_level(levels_ptr):
    """The level ``lane % 16`` of each lane."""
    return tl.inline_asm_elementwise(
        "{ .reg .u32 t; .reg .u64 a; mov.u32 t, %laneid; and.b32 t, t, 15; mul.wide.u32 a, t, 4; add.u64 a, a, $1; "
        "ld.global.nc.b32 $0, [a]; }",
        "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def loads_before_this(ORDERED: tl.constexpr):
    """Have loads that stand before this issued before it: ptxas would put them off until registers are free."""
    if ORDERED:
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def levels_of(words, levels_ptr, held, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """The eight levels of each word in the last of seven dimensions, in the order of its values."""
    if LEVELS == 2:
        # A byte moved to bits 7 to 14 is its place; 0xea: (a & b) | c. In pairs to the end: halves are copied.
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            "{ .reg .b32 s, table; mov.u32 table, pairs; "
            "shl.b32 s, $4, 7; lop3.b32 s, s, 0x7f80, $5, 0xea; add.u32 s, s, table; ld.shared.b32 $0, [s]; "
            "shr.u32 s, $4, 1; lop3.b32 s, s, 0x7f80, $5, 0xea; add.u32 s, s, table; ld.shared.b32 $1, [s]; "
            "shr.u32 s, $4, 9; lop3.b32 s, s, 0x7f80, $5, 0xea; add.u32 s, s, table; ld.shared.b32 $2, [s]; "
            "shr.u32 s, $4, 17; lop3.b32 s, s, 0x7f80, $5, 0xea; add.u32 s, s, table; ld.shared.b32 $3, [s]; }",
            "=&r,=&r,=&r,=&r,r,r", [words, held], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        levels = halves(pairs).to(dtype, bitcast=True)
    elif LEVELS == 1:
        # 0x101f: within 16 lanes, by the four lowest bits of the third operand.
        n1, n0, n3, n2, n5, n4, n7, n6 = tl.inline_asm_elementwise(
            "{ .reg .b32 s, t; "
            "shfl.sync.idx.b32 t, $9, $8, 0x101f, 0xffffffff; cvt.u16.u32 $0, t; "
            "shr.u32 s, $8, 4; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $1, t; "
            "shr.u32 s, $8, 8; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $2, t; "
            "shr.u32 s, $8, 12; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $3, t; "
            "shr.u32 s, $8, 16; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $4, t; "
            "shr.u32 s, $8, 20; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $5, t; "
            "shr.u32 s, $8, 24; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $6, t; "
            "shr.u32 s, $8, 28; shfl.sync.idx.b32 t, $9, s, 0x101f, 0xffffffff; cvt.u16.u32 $7, t; }",
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, held],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        # join puts its two side by side: the last is the first bit of a value's number.
        even, odd = tl.join(tl.join(n0, n4), tl.join(n2, n6)), tl.join(tl.join(n1, n5), tl.join(n3, n7))
        levels = tl.join(even, odd).to(dtype, bitcast=True)
    else:
        number = along(8, 6, False)
        levels = tl.load(levels_ptr + ((words >> (number // 2 * 8 + 4 - number % 2 * 4)) & 15)).to(dtype)
    shape: tl.constexpr = words.shape
    return tl.reshape(levels, (shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], 8))


@triton.jit
def sums_of(weight, x, scales, ORDER: tl.constexpr, DOTS: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr):
    """What one turn adds to the sums: (WARPS, ROWS, N), or without tensor cores (4, 8, WARPS, ROWS / 8).

    ``scales`` have two of the sixth dimension where both halves of the columns are for every lane.
    """
    WARPS: tl.constexpr = weight.shape[2]
    UNITS: tl.constexpr = weight.shape[3]
    ROWS: tl.constexpr = weight.shape[4] * 8
    if not DOTS:
        sums = tl.sum(tl.sum(weight.to(tl.float32) * x.to(tl.float32), 6), 5)
        if isinstance(scales, tl.tensor):
            sums *= tl.reshape(scales, (4, 8, WARPS, UNITS, ROWS // 8))
        sums = tl.sum(sums, 3)
    else:
        if not PAIRS:
            part = multiplied(weight, x, ORDER)
        elif scales.shape[5] == 1:
            part = multiplied(weight, numbers(x, weight.dtype), ORDER)
            part *= over_sums(tl.reshape(scales, (4, 8, WARPS, UNITS, ROWS // 8)), N)
        else:
            first, second = tl.split(tl.reshape(scales, (4, 8, WARPS, UNITS, ROWS // 8, 2)))
            in_first = along(4, 0, False) < 2
            part = multiplied(weight, numbers(tl.where(in_first, x, 0), weight.dtype), ORDER) * over_sums(first, N)
            part += multiplied(weight, numbers(tl.where(in_first, 0, x), weight.dtype), ORDER) * over_sums(second, N)
        sums = tl.sum(tl.reshape(part, (UNITS, WARPS, ROWS, N)), 0)
    return sums


@triton.jit
def rows_of(sums, DOTS: tl.constexpr, M: tl.constexpr, SLICES: tl.constexpr):
    """The sums of all quarters, slices and warps: (ROWS, M).

    Those of a warp first, so that little goes through shared memory: gate and up took 28.4 us the other way, and 26.6.
    """
    if DOTS:
        WARPS: tl.constexpr = sums.shape[0]
        ROWS: tl.constexpr = sums.shape[1] // SLICES
        y = tl.reshape(sums, (WARPS, ROWS, SLICES, SLICES, sums.shape[2] // SLICES // M, M))
        y = tl.sum(y, 4)
        if SLICES > 1:
            # Of a row's slices each has been multiplied by all slices of x.
            slice = tl.arange(0, SLICES)
            own = slice[:, None] == slice[None]
            y = tl.where(own[None, None, :, :, None], y, 0.0)
        y = tl.sum(tl.sum(tl.sum(y, 3), 2), 0)
    else:
        y = tl.permute(tl.sum(tl.sum(sums, 2), 0), (1, 0))
        y = tl.reshape(y, (y.shape[0] * 8, 1))
    return y
