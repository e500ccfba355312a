"""Compile every Triton kernel for every card it has to run on; no card is needed.

Prints, for each, what it takes of a block's shared memory, and fails where a card has less.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jebi.kernels.gpu import adamw8bit, cross_entropy, fp8, gather, glu, nf4, rms_norm, rope

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, by compute capability (CUDA programming guide, technical specifications)."""

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
    found.append((nf4._dequantize, dense, {"COLUMNS": 14336, "VALUES": 1024}, 4))
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
    return found + (fp8_cases(value) if capability >= 89 else [])


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


def main() -> None:
    """Compile them all."""
    for capability, limit in SHARED_KIB.items():
        target = GPUTarget("cuda", capability, 32)
        worst = 0
        for value in ("*fp16",) if capability < 80 else ("*fp16", "*bf16"):
            for kernel, types, constants, warps in cases(value, capability):
                names = kernel.arg_names
                missing = set(names) - set(types) - set(constants)
                assert not missing, f"{kernel.__name__} takes {missing} too"
                signature = {name: types.get(name, "constexpr") for name in names}
                constants = {name: constant for name, constant in constants.items() if name in names}
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                compiled = triton.compile(source, target=target, options={"num_warps": warps})
                worst = max(worst, compiled.metadata.shared)
                if compiled.metadata.shared > limit * 1024:
                    sys.exit(
                        f"{kernel.__name__} takes {compiled.metadata.shared} bytes of shared memory on {capability}"
                    )
        count = len(cases("*fp16", capability))
        print(f"compute capability {capability / 10}: {count} kernels, at most {worst} bytes shared")


if __name__ == "__main__":
    main()
