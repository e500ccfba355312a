"""What a program of `gpu.few_rows` reads of W and of ``x``, in the order in which tensor cores take it.

Nothing may be exchanged between threads on the way there: that costs more than all the rest. A matrix product takes any
order of its columns, if ``x`` has the same. So each lane multiplies the 16 neighbouring values that it has read of a
block of 64, where the tensor cores expect columns that lie apart; and tensors have their dimensions in the order in
which Triton deals them to lanes, warps and registers, so that what is read lies as an operand does. A level is one
shuffle: each lane holds level ``lane % 16``. (PTX ISA, ``shfl.sync`` and ``mma.m16n8k16``.)

Seven dimensions: 0 the quarters of a block (lanes), 1 eight rows (lanes), 2 WARPS, 3 BLOCKS of a warp, 4 rows / 8, and
5 and 6 the 2 x 8 values of a lane.
"""

import triton
import triton.language as tl

from jebi.kernels.gpu.dependent import fetch


def order(kind: int) -> dict[str, int | bool]:
    """In which order Triton deals dimensions to lanes, and which columns a lane of the tensor cores has.

    Another order is right too, but exchanges everything through shared memory: 3 to 6 instructions a weight and ten
    barriers a turn. Seen in what 3.6, 3.7, 3.8 and 3.9 compile to; a test counts the barriers.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return {"LAST_FIRST": version >= (3, 7), "ORDER": (0, 1, 0 if version >= (3, 8) else 2)[kind]}


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
def along(size: tl.constexpr, axis: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The numbers from 0 along one of seven dimensions."""
    at: tl.constexpr = 5 - axis if LAST_FIRST and axis < 6 else axis
    # By expanding: Triton does not see through a reshape which numbers are neighbours.
    numbers = tl.arange(0, size)
    for _ in tl.static_range(at):
        numbers = tl.expand_dims(numbers, 0)
    for dimension in tl.static_range(at + 1, 7):
        numbers = tl.expand_dims(numbers, dimension)
    return numbers


@triton.jit
def operand(values, LEFT: tl.constexpr, ORDER: tl.constexpr, LAST_FIRST: tl.constexpr):
    """What lanes have read, as an operand: (BLOCKS * WARPS, rows, 64), or on the right (BLOCKS * WARPS, 64, rows).

    A lane of the tensor cores has two neighbouring columns, or FOURS, where Triton thinks of packed numbers.
    """
    if LAST_FIRST:
        values = tl.permute(values, (5, 4, 3, 2, 1, 0, 6))
    WARPS: tl.constexpr = values.shape[2]
    BLOCKS: tl.constexpr = values.shape[3]
    EIGHTS: tl.constexpr = values.shape[4]
    EIGHT: tl.constexpr = values.shape[1]
    values = tl.reshape(values, (4, EIGHT, WARPS, BLOCKS, EIGHTS, 2, 2, 2, 2))
    if LEFT:
        if ORDER == 0:
            values = tl.permute(values, (3, 2, 4, 1, 5, 6, 7, 0, 8))
        elif ORDER == 1:
            values = tl.permute(values, (3, 2, 4, 1, 5, 6, 0, 7, 8))
        else:
            values = tl.permute(values, (3, 2, 4, 1, 6, 7, 0, 5, 8))
        values = tl.reshape(values, (BLOCKS * WARPS, EIGHTS * EIGHT, 64))
    else:
        if ORDER == 0:
            values = tl.permute(values, (3, 2, 5, 6, 7, 0, 8, 4, 1))
        elif ORDER == 1:
            values = tl.permute(values, (3, 2, 5, 6, 0, 7, 8, 4, 1))
        else:
            values = tl.permute(values, (3, 2, 6, 7, 0, 5, 8, 4, 1))
        values = tl.reshape(values, (BLOCKS * WARPS, 64, EIGHTS * EIGHT))
    return values


@triton.jit
def weight_at(
    weight_ptr, w_row, block, quarter, half, value, there, COLUMNS: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """W as it is stored: values, or words of eight levels with a last dimension of one."""
    if KIND == 2:
        # Triton sees through this, not through a division or another condition for each word, that two are neighbours.
        inside = (block * 64 < COLUMNS) & there
        word = block * 8 + quarter * 2 + half
        weight = tl.load(weight_ptr + w_row * (COLUMNS // 8) + word, inside, other=0)
    else:
        place = block * 64 + quarter * 16 + half * 8
        weight = tl.load(weight_ptr + w_row * COLUMNS + (place + value), (place < COLUMNS) & there, other=0)
    return weight


@triton.jit
def scale_at(
    w_row, block, there, scales_ptr, nested_ptr, offsets_ptr, codes_ptr, ALL: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """Scales of these blocks of 64, float32; `quant.nf4` says what they are made of."""
    inside = (block < ALL) & there
    # Neighbours go to other warps: what lies side by side must not decide about lanes.
    index = tl.max_contiguous(w_row * ALL + block, [1, 1, 1, 1, 1, 1, 1])
    scale = tl.load(scales_ptr + index, inside, other=0)
    if NESTED:
        nested = tl.load(nested_ptr + index // 256, inside, other=0.0)
        offset = tl.load(offsets_ptr + index // 256, inside, other=0.0)
        scale = tl.load(codes_ptr + scale.to(tl.int32)) * nested + offset
    return scale


@triton.jit
def own_level(levels_ptr, dtype: tl.constexpr, SHUFFLE: tl.constexpr):
    """The level ``lane % 16`` of each lane, rounded to ``dtype`` of 16 bits, in an int32."""
    if SHUFFLE:
        own = tl.inline_asm_elementwise(
            "{ .reg .u32 t; .reg .u64 a; mov.u32 t, %laneid; and.b32 t, t, 15; mul.wide.u32 a, t, 4; add.u64 a, a, $1; "
            "ld.global.nc.b32 $0, [a]; }",
            "=r,l", [levels_ptr.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        own = own.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        own = 0
    return own


@triton.jit
def levels_of(words, levels_ptr, own, dtype: tl.constexpr, SHUFFLE: tl.constexpr):
    """The eight levels of each word in the last of seven dimensions, in the order of its values."""
    if SHUFFLE:
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
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r", [words, own],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True, pack=1,
        )  # fmt: skip
        # join puts its two side by side: the last is the first bit of a value's number.
        even, odd = tl.join(tl.join(n0, n4), tl.join(n2, n6)), tl.join(tl.join(n1, n5), tl.join(n3, n7))
        levels = tl.join(even, odd).to(dtype, bitcast=True)
    else:
        number = along(8, 6, False)
        levels = tl.load(levels_ptr + ((words >> (number // 2 * 8 + 4 - number % 2 * 4)) & 15)).to(dtype)
    return tl.reshape(
        levels,
        (words.shape[0], words.shape[1], words.shape[2], words.shape[3], words.shape[4], words.shape[5], 8),
    )
