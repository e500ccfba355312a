"""Which tiles suit a card: decoding's products over many ways of cutting them, at Llama 3.1 8B's shapes.

    python benchmarks/few_rows.py [--rows 1 2 4 16] [--kind nf4] [--shapes qkv o gate_up down] [--json FILE]

For each shape and number of rows the best three tiles with their GB/s (weights and scales, read once) beside a copy's,
and the one that `tile_of` takes now. Each call reads another copy of the weight, so that none is found in the cache; no
time is printed of a result that is off. A card is needed; the first run compiles for some minutes.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from jebi.kernels import few_rows
from jebi.kernels.gpu import few_rows as gpu
from jebi.kernels.gpu.few_rows_before import normed_and_compressed
from jebi.kernels.gpu.few_rows_epilogue import Epilogue
from kernels import copy_bandwidth

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Outputs and inputs of a layer's maps."""
LAYERS = 32
RANKS = {"qkv": 48, "o": 16, "gate_up": 32, "down": 16}
"""Of the adapters at rank 16."""
COLD = 160 * 2**20
"""Bytes of weights in one round, several times a card's cache."""


def random_weight(kind: str, rows: int, columns: int) -> few_rows.Weight:
    """Any bytes; scales such that outputs are about 1."""
    device = torch.device("cuda")
    scale = 2 / columns**0.5
    if kind == "dense":
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=device) * columns**-0.5
    scales = torch.full((columns // 64, rows), scale, device=device)
    if kind == "int8":
        codes = torch.randint(-127, 128, (rows * columns,), dtype=torch.int8, device=device)
        return few_rows.Stack(codes, scales / 127, (rows, columns))
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, device=device)
    return few_rows.Stack(codes, scales, (rows, columns))


DTYPE = torch.bfloat16


def nbytes(weight: few_rows.Weight) -> int:
    """What must be read of it."""
    return weight.nbytes if isinstance(weight, Tensor) else weight.codes.nbytes + weight.scales_BN.nbytes


def tiles(rows: int) -> Iterator[gpu.Tile]:
    """What is worth a try."""
    # More sums than that do not fit beside a table of levels.
    for height, warps, units in product((16, 32, 64), (2, 4, 8, 16), (1, 2)):
        if height * units <= (64 if rows <= 4 else 32) and height * warps <= 128:
            yield gpu.Tile(height, warps, units)


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of these within a captured round of all."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times[1:])


class Shape:
    """One shape with everything that is fused into its product."""

    def __init__(self, name: str, kind: str, rows: int):
        outputs, inputs = SHAPES[name]
        self.weights = [random_weight(kind, outputs, inputs)]
        self.bytes = nbytes(self.weights[0])
        copies = min(64, max(4, COLD // self.bytes + 1))
        self.weights += [random_weight(kind, outputs, inputs) for _ in range(copies - 1)]
        self.stored = [few_rows.as_stored(weight) for weight in self.weights]
        activation = "silu" if name == "gate_up" else None
        x = torch.randn(rows, inputs, dtype=DTYPE, device="cuda")
        self.laid, _ = normed_and_compressed(x, None, x[:1])
        left, right = (torch.randn(size, RANKS[name], dtype=DTYPE, device="cuda") * 0.1 for size in (rows, outputs))
        residual = torch.randn(rows, outputs, dtype=DTYPE, device="cuda") if name in ("o", "down") else None
        self.after = Epilogue(None, left, right, few_rows.ACTIVATIONS.get(activation), 1.0, residual)
        thin = few_rows.LowRank(left, right.t())
        self.expected = few_rows.product_reference(x, self.weights[0], None, thin, activation, 1.0, residual)

    def timed(self, tile: gpu.Tile | None) -> float:
        """Microseconds a call; `RuntimeError` where the result is off or the tile does not fit."""
        out = torch.full_like(self.expected, torch.nan)

        def run(number: int, out: Tensor = out) -> None:
            gpu.product(self.laid, self.stored[number], self.after, out, tile)

        run(0)
        off = (out - self.expected).float().norm() / self.expected.float().norm()
        if not off < 0.02:  # bfloat16 rounds by 2**-9, and plain torch rounds the weight too
            raise RuntimeError(f"off by {off:.3f}")
        return microseconds([partial(run, number) for number in range(len(self.weights))])


def measured(name: str, kind: str, rows: int, bandwidth: float) -> dict[str, object]:
    """Time all tiles of a shape; print the best."""
    shape, results = Shape(name, kind, rows), []
    for tile in tiles(rows):
        try:
            results.append((shape.timed(tile), tile))
        except Exception as error:  # a tile that a card has no room for is no candidate; anything else is said
            print(f"    {tile}: {str(error).splitlines()[0][:90]}")
    results.sort(key=lambda result: result[0])
    present = shape.timed(None)
    for took, tile in [*results[:3], (present, "now")]:
        speed = shape.bytes / took / 1e3
        print(f"  {name:8} M={rows:<3} {took:8.2f} us {speed:7.0f} GB/s {speed / bandwidth:5.0%}  {tile}", flush=True)
    return {
        "shape": name,
        "kind": kind,
        "rows": rows,
        "us": results[0][0],
        "now_us": present,
        "tile": str(results[0][1]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16], help="of x")
    parser.add_argument("--kind", choices=("nf4", "int8", "dense"), default="nf4")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="triton")
    bandwidth = copy_bandwidth(torch.device("cuda"), 2**30)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.kind}; a copy: {bandwidth:,.0f} GB/s")
    figures = []
    for rows in arguments.rows:
        layer = [measured(name, arguments.kind, rows, bandwidth) for name in arguments.shapes]
        for column in ("us", "now_us"):
            print(
                f"  all layers at M={rows}, {column}: {LAYERS * sum(float(str(x[column])) for x in layer) / 1e3:.2f} ms"
            )
        figures += layer
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
