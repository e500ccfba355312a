"""Every operation of jebi's kernels on the present device, at Llama 3.1 8B's shapes, beside its plain-torch reference.

    python benchmarks/kernels.py [--tokens 4096] [--json FILE]

``GB/s`` counts what an operation must read and write, once, in the time it took; the measured copy bandwidth stands in
the first line. Times are of captured graphs, as a training replays them, without the host's; at 4,096 tokens part of a
small operation's tensors stays in a card's cache, so more than the copy's bandwidth is possible: --tokens 32768 shows
the memory's. A reference's backward is its forward and backward less its forward. On a CPU both columns are plain torch
(what layers call there, and the reference), at small shapes. Cross-entropy is bound by its products, not by memory.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from jebi.kernels import (
    adamw8bit,
    cached_attention,
    dequantize,
    few_rows,
    gather,
    glu,
    linear_cross_entropy,
    nf4_on_cpu,
    rms_norm,
    rope,
    scaled_product,
    sliced_cross_entropy,
)
from jebi.kernels.low_rank import LowRank, added
from jebi.nn.host_weight import HostWeight, matrix
from jebi.nn.slices import WeightSlices
from jebi.quant.fp8 import quantize_rows
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

Run = Callable[[], object]

REPEATS = 10
"""Calls of one measurement."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and a pass."""

    tokens: int = 4096
    width: int = 4096
    feed_forward: int = 14336
    heads: int = 40
    """Of q and k together."""
    head: int = 128
    vocabulary: int = 128256
    rank: int = 32
    """Of gate's and up's adapters together."""
    trained: int = 41_943_040
    chunks: tuple[int, ...] = (128, 512, 1024, 4096)

    @property
    def groups(self) -> int:
        """Heads of keys, one for four of queries."""
        return self.heads // 5


SMALL = Shapes(64, 128, 256, 6, 16, 512, 8, 65_536, (16, 64))


@dataclass(frozen=True)
class Case:
    """One operation."""

    name: str
    bytes: float
    """What it must read and write."""
    kernel: Run
    reference: Run
    before: Run | None = None
    """What of the reference is not to be counted: its forward."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    kernel_ms: float
    reference_ms: float
    gb_s: float


def seconds(run: Run, device: torch.device) -> float:
    """Median time of one call."""
    run()
    times = []
    if device.type != "cuda":
        for _ in range(REPEATS):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # whatever is made at the first call is made outside of the capture
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(REPEATS):
            run()
    graph.replay()
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / REPEATS)
    return statistics.median(times)


def gradients(forward: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> Run:
    """Forward and backward of a reference."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)


def cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """All operations; each one's tensors are gone when the next is asked for."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device, generator=generator) * scale

    yield from _norm_cases(shapes, drawn)
    yield from _rope_cases(shapes, drawn)
    yield from _glu_cases(shapes, drawn)
    for name, form in (("nf4", NF4Weight), ("int8", Int8Weight)):
        weight = form.quantize(drawn(shapes.feed_forward, shapes.width))
        moved = weight.nbytes + math.prod(weight.shape) * dtype.itemsize
        yield Case(f"{name} dequantise", moved, partial(dequantize.dense, weight, dtype), partial(weight.dense, dtype))
        del weight
    yield _gather_case(shapes, drawn, generator)
    yield from _fp8_cases(shapes, drawn)
    yield from _few_rows_cases(shapes, drawn)
    if device.type == "cpu":
        yield _nf4_on_cpu_case(shapes, drawn)
    yield _cached_attention_case(shapes, drawn)
    yield from _loss_cases(shapes, drawn, generator)
    yield from _adam_cases(shapes, device, generator)


def _norm_cases(shapes: Shapes, drawn: Callable[..., Tensor]) -> Iterator[Case]:
    x, dy, residual = (drawn(shapes.tokens, shapes.width) for _ in range(3))
    weight, eps = drawn(shapes.width), 1e-5
    _, rstd = rms_norm.rms_norm_forward(x, weight, eps)
    plain = partial(rms_norm.rms_norm, x, weight, eps)
    yield Case("rms_norm forward", 2 * x.nbytes, lambda: rms_norm.rms_norm_forward(x, weight, eps), plain)
    backward = gradients(lambda leaf: rms_norm.rms_norm(leaf, weight, eps) + leaf, [x], dy)
    yield Case(
        "rms_norm backward + residual",
        4 * x.nbytes,
        lambda: rms_norm.rms_norm_backward(dy, x, rstd, weight, residual_TD=residual),
        backward,
        plain,
    )


def _rope_cases(shapes: Shapes, drawn: Callable[..., Tensor]) -> Iterator[Case]:
    x = drawn(shapes.tokens, shapes.heads, shapes.head)
    frequencies = 500_000 ** (-torch.arange(0, shapes.head, 2, device=x.device) / shapes.head)
    cos, sin = rope.rope_tables(torch.arange(shapes.tokens, device=x.device), frequencies, 1.0, x.dtype)
    moved = 2 * x.nbytes + 2 * cos.nbytes
    yield Case("rope, q and k", moved, lambda: rope.rope_(x, cos, sin), lambda: rope.rope(x, cos, sin))


def _glu_cases(shapes: Shapes, drawn: Callable[..., Tensor]) -> Iterator[Case]:
    da, gate, up = (drawn(shapes.tokens, shapes.feed_forward) for _ in range(3))
    size, rank = gate.nbytes, shapes.rank
    thin_bytes = (shapes.tokens + shapes.feed_forward) * rank * gate.element_size()
    thins = [LowRank(drawn(shapes.tokens, rank), drawn(rank, shapes.feed_forward, scale=0.01)) for _ in range(3)]
    own = gate.clone(), up.clone(), da.clone()  # a kernel writes over them
    for name, (first, second, third) in (("", (None, None, None)), (", thin products", thins)):
        count = 0 if first is None else 1

        def plain(gate: Tensor, up: Tensor, first: LowRank | None = first, second: LowRank | None = second) -> Tensor:
            return glu.glu(added(gate, first), added(up, second), "silu")

        forward = partial(glu.glu_forward, gate, up, "silu", (first, second))
        yield Case(f"glu forward{name}", 3 * size + 2 * count * thin_bytes, forward, partial(plain, gate, up))
        backward = partial(glu.glu_backward_, own[2], own[0], own[1], "silu", (first, second), third)

        def plain_backward(run: Callable[..., Tensor] = plain, third: LowRank | None = third) -> tuple[Tensor, ...]:
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            return torch.autograd.grad(run(*leaves), leaves, added(da, third))

        moved = 6 * size + 3 * count * thin_bytes
        yield Case(f"glu backward{name}", moved, backward, plain_backward, partial(plain, gate, up))


def _gather_case(shapes: Shapes, drawn: Callable[..., Tensor], generator: torch.Generator) -> Case:
    """Out of host memory, which the bus bounds and not the card's memory."""
    table = drawn(shapes.vocabulary, shapes.width)
    ids = torch.randint(0, shapes.vocabulary, (shapes.tokens,), device=table.device, generator=generator)
    held = HostWeight(nn.Parameter(table.cpu(), requires_grad=False), table.device)
    moved = 2 * shapes.tokens * shapes.width * table.element_size()
    return Case("gather from host memory", moved, partial(gather.gather, matrix(held), ids), lambda: table[ids])


def _fp8_cases(shapes: Shapes, drawn: Callable[..., Tensor]) -> Iterator[Case]:
    """Beside the same product in the compute dtype; on a CPU the same numbers in float32."""
    x = drawn(shapes.tokens, shapes.width)
    weight = drawn(shapes.feed_forward, shapes.width)
    in_8_bits, rows = scaled_product.quantized(weight), scaled_product.quantized(x)
    quantise = partial(scaled_product.quantized, x)
    yield Case("rows to fp8", 1.5 * x.nbytes, quantise, partial(quantize_rows, x))
    moved = (
        rows.numbers_TK.nbytes + in_8_bits.numbers_TK.nbytes + shapes.tokens * shapes.feed_forward * x.element_size()
    )
    product = partial(scaled_product.product, rows, in_8_bits, x.dtype)
    yield Case("scaled product, gate", moved, product, lambda: x @ weight.t())


def _few_rows_cases(shapes: Shapes, drawn: Callable[..., Tensor]) -> Iterator[Case]:
    """Decoding's products of 4-bit weights. Each call reads another weight, so that a card's cache holds none of it."""
    width, ffn = shapes.width, shapes.feed_forward
    sizes = {"qkv": ((shapes.heads + shapes.groups) * shapes.head, width), "o": (width, width), "down": (width, ffn)}
    for name, (outputs, inputs) in (sizes | {"gate and up": (2 * ffn, width)}).items():
        stack = few_rows.stacked([NF4Weight.quantize(drawn(outputs, inputs, scale=inputs**-0.5))])
        assert isinstance(stack, few_rows.Stack)
        copies = [replace(stack, codes=stack.codes.clone()) for _ in range(REPEATS)]
        stored = sum(part.nbytes for part in vars(stack).values() if isinstance(part, Tensor))
        for rows in (1, 4, 16):
            x, turn = drawn(rows, inputs), cycle(copies)
            activation: glu.Activation | None = "silu" if name == "gate and up" else None

            def run(x: Tensor = x, turn: Iterator[few_rows.Stack] = turn, activation: Any = activation) -> object:
                return few_rows.product(x, next(turn), activation=activation)

            plain = partial(few_rows.product_reference, x, stack, activation=activation)
            yield Case(f"few rows, {name}, {rows}", stored, run, plain)


def _nf4_on_cpu_case(shapes: Shapes, drawn: Callable[..., Tensor]) -> Case:
    """One row; where bitsandbytes' kernel is not, both columns are the product that layers make then."""
    weight, x = NF4Weight.quantize(drawn(2 * shapes.feed_forward, shapes.width)), drawn(1, shapes.width)
    plain = partial(nf4_on_cpu.product_reference, x, [weight])
    product = nf4_on_cpu.product_of([weight], x.dtype)
    return Case("nf4 on a CPU, 1 row", weight.nbytes, plain if product is None else partial(product, x), plain)


def _cached_attention_case(shapes: Shapes, drawn: Callable[..., Tensor]) -> Case:
    """Of 16 rows, the cache full."""
    qkv = drawn(16, 6 * shapes.groups * shapes.head)
    k, v = (drawn(16, shapes.groups, shapes.tokens, shapes.head) for _ in range(2))
    end = torch.full((16,), shapes.tokens, dtype=torch.int32, device=qkv.device)
    counts = torch.zeros(16 * shapes.groups, dtype=torch.int32, device=qkv.device)
    settings = (
        qkv,
        (drawn(16, shapes.head), drawn(16, shapes.head)),
        (k, v),
        end,
        cached_attention.Form(shapes.head**-0.5),
    )
    reference = partial(cached_attention.cached_attention_reference, *settings)
    moved = k.nbytes + v.nbytes
    attention = partial(cached_attention.cached_attention, *settings, counts)
    return Case("cached attention, 16 rows", moved, attention, reference)


def _loss_cases(shapes: Shapes, drawn: Callable[..., Tensor], generator: torch.Generator) -> Iterator[Case]:
    hidden = drawn(shapes.tokens, shapes.width).requires_grad_()
    head = drawn(shapes.vocabulary, shapes.width, scale=shapes.width**-0.5)
    labels = torch.randint(0, shapes.vocabulary, (shapes.tokens,), device=head.device, generator=generator)

    def reference() -> object:
        return torch.autograd.grad(linear_cross_entropy.linear_cross_entropy_reference(hidden, head, labels), hidden)

    def chunked(chunk: int) -> object:
        with mock.patch.object(linear_cross_entropy, "chunk_tokens", return_value=chunk):
            return torch.autograd.grad(linear_cross_entropy.linear_cross_entropy(hidden, head, labels), hidden)

    for chunk in shapes.chunks:
        # Its products read the head twice a chunk; the logits go out and in four times.
        logits = 4 * shapes.tokens * shapes.vocabulary * head.element_size()
        moved = 2 * math.ceil(shapes.tokens / chunk) * head.nbytes + logits
        yield Case(f"linear cross-entropy, chunks of {chunk}", moved, partial(chunked, chunk), reference)
    for name, weight in (
        ("host memory", HostWeight(nn.Parameter(head.cpu(), requires_grad=False), head.device)),
        ("NF4", NF4Weight.quantize(head)),
    ):
        slices = WeightSlices(weight, head.dtype)

        def sliced(slices: WeightSlices = slices) -> object:
            return torch.autograd.grad(sliced_cross_entropy.sliced_cross_entropy(hidden, slices, labels), hidden)

        yield Case(f"sliced cross-entropy, head in {name}", head.nbytes + logits, sliced, reference)


def _adam_cases(shapes: Shapes, device: torch.device, generator: torch.Generator) -> Iterator[Case]:
    param, grad = (torch.randn(shapes.trained, device=device, generator=generator) for _ in range(2))
    blocks = -(-shapes.trained // adamw8bit.BLOCK)
    moments = adamw8bit.Moments8(
        *(torch.zeros(shapes.trained, dtype=torch.uint8, device=device) for _ in range(2)),
        *(torch.zeros(blocks, device=device) for _ in range(2)),
    )
    rates = adamw8bit.Rates(1e-4, 0.9, 0.999, 1e-8, 0.01, 1)
    moved = 3 * param.nbytes + 2 * sum(tensor.nbytes for tensor in vars(moments).values())
    yield Case(
        "adamw8bit",
        moved,
        partial(adamw8bit.adamw8bit_, param, grad, moments, rates),
        partial(adamw8bit.adamw8bit_reference_, param, grad, moments, rates),
    )


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Gigabytes a second, read and written, of a copy within the device."""
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    # A kernel: within a captured graph `copy_` goes to a copy engine, of a third less on an H200.
    return 2 * size / 1e9 / seconds(lambda: torch.bitwise_not(source, out=target), device)


def measured(case: Case, device: torch.device) -> Result:
    """Time an operation and its reference."""
    kernel = seconds(case.kernel, device)
    reference = seconds(case.reference, device) - (seconds(case.before, device) if case.before is not None else 0)
    return Result(case.name, round(kernel * 1e3, 4), round(reference * 1e3, 4), round(case.bytes / 1e9 / kernel, 3))


def table(results: list[Result], bandwidth: float) -> str:
    """As Markdown."""
    lines = ["| operation | ms | reference ms | GB/s | of a copy's |", "|---|---|---|---|---|"]
    lines.append(f"| copy | | | {bandwidth:,.0f} | |")
    for result in results:
        speeds = f"{result.gb_s:,.0f} | {result.gb_s / bandwidth:.0%}"
        lines.append(f"| {result.name} | {result.kernel_ms:.3f} | {result.reference_ms:.3f} | {speeds} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of a pass; 4,096 on a card, 64 on a CPU")
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    on_card = torch.cuda.is_available()
    device = torch.device("cuda" if on_card else "cpu")
    shapes = Shapes() if on_card else SMALL
    if arguments.tokens:
        shapes = Shapes(**asdict(shapes) | {"tokens": arguments.tokens})
    bandwidth = copy_bandwidth(device, 2**30 if on_card else 2**24)
    dtype = torch.bfloat16 if on_card else torch.float32
    results = [measured(case, device) for case in cases(shapes, device, dtype)]
    name = torch.cuda.get_device_name() if on_card else "CPU"
    print(f"{name}, torch {torch.__version__}, {shapes.tokens:,} tokens\n\n{table(results, bandwidth)}")
    if arguments.json:
        figures = {"device": name, "torch": torch.__version__, "shapes": asdict(shapes), "copy_gb_s": bandwidth}
        figures["operations"] = [asdict(result) for result in results]
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
