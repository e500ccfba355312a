"""Compile every Triton kernel for every card it has to run on; no card is needed.

Prints, for each, what it takes of a block's shared memory, and fails where a card has less.
"""

import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jebi.kernels.gpu import (
    adamw8bit,
    cached_attention,
    cross_entropy,
    few_rows,
    few_rows_before,
    few_rows_operands,
    fp8,
    gather,
    glu,
    int8,
    nf4,
    rms_norm,
    rope,
)

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, by compute capability (CUDA programming guide, technical specifications)."""

STATIC = 49152
"""Bytes of shared memory that a kernel may have without asking for more, its own tables' included."""

LONG, FLOAT, SCALAR = "i64", "*fp32", "fp32"


def cases(value: str, capability: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Each kernel with the types and constants of a Llama 3.1 8B layer, and its warps; ``value`` is a pointer."""
    norm = {"x_ptr": value, "weight_ptr": value, "y_ptr": value, "rstd_ptr": FLOAT}
    rows = {"x_stride": "i32", "width": "i32", "eps": SCALAR}
    found = [(rms_norm._forward, norm | rows, {"UNIT_OFFSET": True, "BLOCK": block}, 8) for block in (4096, 8192)]
    back = {
        "dy_ptr": value,
        "x_ptr": value,
        "rstd_ptr": FLOAT,
        "weight_ptr": value,
        "added_ptr": value,
        "dx_ptr": value,
    }
    back |= {"dy_stride": "i32", "x_stride": "i32", "added_stride": "i32", "width": "i32"}
    found.append((rms_norm._backward, back, {"UNIT_OFFSET": False, "ADD": True, "BLOCK": 4096}, 8))
    turn = {"x_ptr": value, "cos_ptr": value, "sin_ptr": value, "out_ptr": value}
    counts = (
        "x_token",
        "x_head",
        "out_token",
        "out_head",
        "tokens",
        "heads",
        "queries",
        "keys",
        "half",
        "rest",
        "size",
    )
    turn |= dict.fromkeys((*counts, "left_stride", "right_row", "right_column"), "i32") | {"sign": SCALAR}
    for name in ("q", "k", "v"):
        turn |= {f"{name}_left": value, f"{name}_right": value, f"{name}_rank": "i32"}
    for rank, rest in ((0, 64), (16, 0), (64, 64)):
        found.append((rope._rotate, turn, {"TOKENS": 16, "HEADS": 4, "HALF": 64, "REST": rest, "RANK": rank}, 2))
    strides = {"gate_stride": "i32", "up_stride": "i32", "tokens": "i32", "width": "i32", "scale": SCALAR}
    thin: dict[str, str] = {}
    for name in ("gate", "up", "da"):
        thin |= {f"{name}_left": value, f"{name}_right": value, f"{name}_rank": "i32"}
        thin |= dict.fromkeys((f"{name}_left_stride", f"{name}_right_row", f"{name}_right_column"), "i32")
    # The highest rank in 16 bits that `kernels.glu.carries` names.
    highest = 64 if capability >= 80 else 32
    for kind in range(3):
        constants = {"KIND": kind, "GATE_RANK": 16, "UP_RANK": 16, "DA_RANK": 16, "COLUMNS": 128, "STRETCH": 512}
        forward = {"gate_ptr": value, "up_ptr": value, "out_ptr": value, "out_stride": "i32"}
        ranks = {"GATE_RANK": highest, "UP_RANK": highest}
        found.append((glu._forward, forward | strides | thin, constants | ranks | {"TOKENS": 16}, 4))
        backward = {"da_ptr": value, "gate_ptr": value, "up_ptr": value, "da_stride": "i32"}
        backward |= {f"{name}_sum_ptr": FLOAT for name in ("gate", "up", "da")}
        for rank in sorted({16, 32, highest}):
            ranks = {"GATE_RANK": rank, "UP_RANK": rank, "DA_RANK": rank, "SUMMED_RANK": 32 if capability >= 80 else 0}
            flags = {"TOKENS": 32, "KEEP_ACT": True}
            found.append((glu._backward, backward | strides | thin, constants | ranks | flags, 4))
    dense = {"packed_ptr": "*u8", "absmax_ptr": "*u8", "nested_ptr": FLOAT, "offset_ptr": FLOAT, "levels_ptr": FLOAT}
    dense |= {"codes_ptr": FLOAT, "out_ptr": value, "values": "i32", "out_stride": "i32"}
    found.append((nf4._dequantize, dense, {"COLUMNS": 14336, "VALUES": nf4._VALUES}, 4))
    whole = {"codes_ptr": "*i8", "scales_ptr": FLOAT, "out_ptr": value, "values": "i32", "out_stride": "i32"}
    found.append((int8._dequantize, whole, {"COLUMNS": 14336, "VALUES": int8._VALUES}, 4))
    entropy = {"logits_ptr": value, "labels_ptr": "*i64", "counts_ptr": FLOAT, "losses_ptr": FLOAT}
    entropy |= {"vocabulary": "i32", "smoothing": SCALAR, "softcap": SCALAR}
    flags = {"COUNTED": True, "CAPPED": True, "SMOOTHED": True, "GRAD": True, "BLOCK": 4096}
    found.append((cross_entropy._cross_entropy, entropy, flags, 8))
    fold = {"logits_ptr": value, "labels_ptr": "*i64"}
    fold |= dict.fromkeys(("top_ptr", "others_ptr", "hit_ptr", "slope_ptr", "rescale_ptr"), FLOAT)
    fold |= {"rows": "i32", "softcap": SCALAR}
    found.append((cross_entropy._fold, fold, {"CAPPED": True, "GRAD": True, "BLOCK": 4096}, 8))
    step = {"param_ptr": FLOAT, "grad_ptr": FLOAT, "state1_ptr": "*u8", "state2_ptr": "*u8"}
    step |= {"absmax1_ptr": FLOAT, "absmax2_ptr": FLOAT, "codes1_ptr": FLOAT, "nearest1_ptr": "*u8"}
    step |= {"codes2_ptr": FLOAT, "nearest2_ptr": "*u8", "values": "i32"}
    step |= dict.fromkeys(("beta1", "beta2", "eps", "decay", "rate", "correction2"), SCALAR)
    found.append((adamw8bit._step, step, {"BLOCK": 256}, 2))
    table = {"table_ptr": value, "ids_ptr": "*i64", "out_ptr": value, "rows": "i32", "width": "i32", "stride": "i32"}
    found.append((gather._gather, table, {"BLOCK": 1024}, 4))
    found += few_rows_cases(value, capability) + cached_attention_cases(value, capability)
    return found + (fp8_cases(value) if capability >= 89 else [])


def few_rows_cases(value: str, capability: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Decoding's products: every form at one row and at the most, with all that may come after them."""
    types = {"scales_ptr": FLOAT, "scale": SCALAR}
    types |= dict.fromkeys(("x_ptr", "bias_ptr", "left_ptr", "right_ptr", "residual_ptr", "out_ptr"), value)
    types |= {"levels_ptr": FLOAT}
    types |= dict.fromkeys(("left_stride", "right_stride", "residual_stride", "out_stride", "x_stride"), "i32")
    types |= dict.fromkeys(("rank", "tokens", "outputs"), "i32")
    after = {"BIAS": True, "RANK": 64, "EIGHT": True, "ACTIVATION": 0, "RESIDUAL": True}
    found: list[tuple[Any, dict[str, str], dict[str, Any], int]] = []
    stored = {
        few_rows.DENSE: {"weight_ptr": value},
        few_rows.INT8: {"weight_ptr": "*i8"},
        few_rows.NF4: {"weight_ptr": "*i32"},
    }
    dots, levels = capability >= 80, 2 if divmod(capability, 10) in few_rows._ROOMY else 1
    for kind, own in stored.items():
        form = {"KIND": kind, "LEVELS": levels, "OVERLAP": kind == few_rows.NF4 and capability >= 90}
        # Each way in which `tile_of` cuts, 4 bits beside a table on one card, without on another; and fewer ranks.
        every = capability in (86, 90) if kind == few_rows.NF4 else capability == 90
        shapes = [(28672, 14336)] + ([(6144, 4096), (4096, 14336), (4096, 4096)] if every else [])
        for shape, rows in product(shapes, (1, 4, 8, few_rows.MOST) if kind == few_rows.NF4 else (1, 8, few_rows.MOST)):
            tile = few_rows.tile_of(few_rows.Stored(kind, *[torch.empty(0)] * 2, None, shape), rows)
            sizes = {"M": few_rows.padded(rows, kind) if dots else 1, "COLUMNS": shape[1]}
            sizes |= {"ROWS": tile.rows, "WARPS": tile.warps, "UNITS": tile.units}
            sizes |= {"RANK": 16 if shape[0] == 4096 else 64}
            sizes |= {"DOTS": dots, "LAID": max(4, rows)} | few_rows_operands.order(kind)
            found.append((few_rows._product, types | own, after | form | sizes, tile.warps))
    before = dict.fromkeys(("x_ptr", "weight_ptr", "down_ptr", "y_ptr", "xa_ptr"), value) | {"eps": SCALAR}
    before |= dict.fromkeys(("x_stride", "down_stride", "width", "ranks"), "i32")
    constants = {"NORM": True, "ADAPTED": True, "UNIT_OFFSET": False, "RANKS": few_rows_before._RANKS, "ROWS": 4}
    constants |= {"BLOCK": 16384, "OVERLAP": capability >= 90}
    return [*found, (few_rows_before._before, before, constants, 16)]


def cached_attention_cases(value: str, capability: int) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Heads of 128 and of 256; a few queries and many."""
    itemsize = 4 if value == FLOAT else 2
    types = dict.fromkeys(("qkv_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "k_ptr", "v_ptr"), value)
    types |= {"out_ptr": value, "end_ptr": "*i32", "count_ptr": "*i32"}
    types |= dict.fromkeys(("part_ptr", "top_ptr", "sum_ptr"), FLOAT)
    types |= dict.fromkeys(("stride", "k_row", "k_head", "k_place", "v_row", "v_head", "v_place"), "i32")
    types |= dict.fromkeys(("scale", "softcap", "eps", "value_scale"), SCALAR)
    types |= dict.fromkeys(("window", "groups", "queries", "half", "size"), "i32")
    flags = {"NORM": True, "UNIT_OFFSET": False, "WINDOWED": True, "CAPPED": True, "WHOLE": False}
    flags["OVERLAP"] = capability >= 90
    return [
        (
            cached_attention._attend,
            types,
            flags | cached_attention.sizes_of(queries, size, itemsize),
            cached_attention._WARPS,
        )
        for size, queries in product((128, 256), (4, cached_attention.MOST))
    ]


def fp8_cases(value: str) -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Those that write e4m3, as `cases` has the others."""
    rows = {"x_ptr": value, "out_ptr": "*fp8e4nv", "scale_ptr": FLOAT, "x_stride": "i32", "width": "i32"}
    limits = {"LARGEST": fp8.LARGEST, "SMALLEST": fp8.SMALLEST}
    found = [(fp8._quantize_rows, rows, limits | {"BLOCK": block}, warps) for block, warps in ((4096, 4), (16384, 16))]
    stored = {"packed_ptr": "*u8", "absmax_ptr": "*u8", "nested_ptr": FLOAT, "offset_ptr": FLOAT, "levels_ptr": FLOAT}
    stored |= {"codes_ptr": FLOAT, "scale_ptr": FLOAT, "out_ptr": "*fp8e4nv", "rows": "i32", "out_stride": "i32"}
    tile, warps = fp8._TILE
    for transposed in (False, True):
        found.append((fp8._from_nf4, stored, {"COLUMNS": 14336, "TRANSPOSED": transposed, "TILE": tile}, warps))
    return found


def aligned(signature: dict[str, str], strides: bool = True) -> dict[tuple[int], list[list[Any]]]:
    """What a launch tells the compiler of a large model: pointers, strides, values and heads' sizes come by 16.

    Loads are wide then, and several are under way at once, for which shared memory is taken. A launch for a part of
    wider rows may say so of pointers alone.
    """
    ends = ("stride", "_row", "_head", "_place", "_token", "size", "half", "values") if strides else ()
    found = [kind.startswith("*") or (kind == "i32" and name.endswith(ends)) for name, kind in signature.items()]
    return {(place,): [["tt.divisibility", 16]] for place, fits in enumerate(found) if fits}


def first_loop(ptx: str) -> str:
    """The first piece of a program that ends with a jump to its beginning and has matrix products."""
    for match in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE):
        end = re.search(rf"bra[.\w]*\s+\{match[1]};", ptx[match.end() :])
        body = ptx[match.end() : match.end() + end.start()] if end is not None else ""
        if "mma.sync" in body:
            return body
    raise AssertionError("no loop with matrix products")


def compile_for(capability: int) -> str:
    """Compile them all for one kind of card; what was found."""
    target, limit, worst = GPUTarget("cuda", capability, 32), SHARED_KIB[capability], 0
    for value in ("*fp16", FLOAT) if capability < 80 else ("*fp16", "*bf16", FLOAT):
        every = cached_attention_cases(value, capability) if value == FLOAT else cases(value, capability)
        for kernel, types, constants, warps in every:
            stages = cached_attention.stages_of(4) if value == FLOAT else 3  # Triton's own on NVIDIA cards
            compiled = compiled_of(kernel, types, constants, warps, target, stages)
            worst = max(worst, compiled.metadata.shared)
            taken = f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory on {capability}"
            assert compiled.metadata.shared <= limit * 1024, f"{constants}: {taken}"
            if kernel is few_rows._product:
                tables = 32768 if constants["KIND"] == few_rows.NF4 and constants["LEVELS"] == 2 else 0
                if tables and constants["M"] == few_rows.MOST:
                    # Rows that are parts of wider ones: through shared memory, if loads were not seen to be wide.
                    apart = compiled_of(kernel, types, constants | {"LAID": 0}, warps, target, stages, strides=False)
                    needs = f"{apart.metadata.shared} bytes beside its table for rows that are parts of wider ones"
                    assert apart.metadata.shared + tables <= STATIC, f"{constants}: {needs}"
                assert compiled.metadata.shared + tables <= STATIC, f"{constants}: {taken} beside its table"
            if constants.get("DOTS"):
                # Here one for each turn is what a product costs whose operands are exchanged between threads.
                assert "bar.sync" not in first_loop(compiled.asm["ptx"]), f"{constants}: barriers in the loop"
    count = len(cases("*fp16", capability))
    return f"compute capability {capability / 10}: {count} kernels, at most {worst} bytes shared"


def compiled_of(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, target: GPUTarget, stages: int,
    strides: bool = True,
) -> Any:  # fmt: skip
    """A kernel of `cases`, compiled; ``strides`` as in `aligned`."""
    missing = set(kernel.arg_names) - set(types) - set(constants)
    assert not missing, f"{kernel.__name__} takes {missing} too"
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    known = {name: constant for name, constant in constants.items() if name in signature}
    source = ASTSource(kernel, signature, known, aligned(signature, strides))
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def main() -> None:
    """Compile them all, a process a kind of card."""
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for found in pool.map(compile_for, SHARED_KIB):
            print(found, flush=True)


if __name__ == "__main__":
    main()
