"""What the present device reaches at the operations a training is made of: products, attention, copies, and its bus.

The operations are those that training calls, at sizes of Llama 3.1 8B's layer on a card and smaller ones on a CPU. How
plans use the rates is `plan.time`'s; where they are kept, `plan.measured`'s.

Shapes: T tokens, K inputs, N outputs, H query heads, G key/value heads, d head size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.kernels import scaled_product
from jebi.models.device import default_dtype, free_bytes
from jebi.nn.attention_pair import attention_backward, attention_forward
from jebi.nn.rows import rows_from_lengths
from jebi.nn.shape import AttentionForm
from jebi.plan.measured import Rates, processor_name
from jebi.quant.fp8 import Fp8Rows

ROW = 2048
"""Tokens of a row of which attention is measured."""
_LEAST = 0.4
"""Seconds that each operation is repeated for: long enough for a card to warm down to the clock it holds."""


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    tokens: int = 8192
    inputs: int = 4096
    outputs: int = 14336
    rows: int = 4
    """Of attention."""
    heads: int = 32
    groups: int = 8
    head: int = 128
    copied: int = 2**28
    """Bytes."""

    @property
    def bytes(self) -> int:
        """What products and copies take at a time, about."""
        matrices = self.tokens * self.inputs + self.inputs * self.outputs + self.tokens * self.outputs
        return max(2 * matrices, 2 * self.copied)


_LARGE, _MIDDLE = Sizes(), Sizes(4096, 2048, 8192, 1, 16, 4, 128, 2**26)
_SMALL = Sizes(1024, 1024, 4096, 1, 8, 2, 64, 2**26)


def measure(device: torch.device, least: float = _LEAST) -> Rates:
    """Measure a device; a few seconds.

    Args:
        device: a CUDA card, or the CPU.
        least: seconds that each operation is repeated for.
    """
    began = time.perf_counter()
    on_card, dtype = device.type == "cuda", default_dtype(device)
    sizes = _SMALL
    if on_card:
        sizes = _LARGE if free_bytes(device) > 3 * _LARGE.bytes else _MIDDLE
    to_device, from_device = _bus(sizes, device, least) if on_card else (None, None)
    return Rates(
        device=torch.cuda.get_device_name(device) if on_card else processor_name(),
        products=_products(sizes, device, dtype, least),
        fp8=_scaled_products(sizes, device, least) if scaled_product.served(device) else None,
        attention=_attention(sizes, device, dtype, least),
        bandwidth=_bandwidth(sizes, device, least),
        to_device=to_device,
        from_device=from_device,
        dtype=str(dtype).removeprefix("torch."),
        torch=torch.__version__,
        seconds=time.perf_counter() - began,
    )


def seconds(run: Callable[[], object], device: torch.device, least: float) -> float:
    """Mean time of a call, repeated for ``least`` seconds; what the first calls set up is not counted."""
    for _ in range(2):
        run()
    calls, total = 1, _timed(run, device, 1)
    while total < least:
        # At most four times as many at once: the first calls may have been slow.
        calls = min(4 * calls, max(calls + 1, int(1.2 * calls * least / max(total, 1e-6))))
        total = _timed(run, device, calls)
    return total / calls


def _timed(run: Callable[[], object], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _products(sizes: Sizes, device: torch.device, dtype: torch.dtype, least: float) -> float:
    x_TK = torch.randn(sizes.tokens, sizes.inputs, device=device, dtype=dtype)
    w_NK = torch.randn(sizes.outputs, sizes.inputs, device=device, dtype=dtype)
    y_TN = torch.empty(sizes.tokens, sizes.outputs, device=device, dtype=dtype)
    return _flops(sizes) / seconds(lambda: torch.mm(x_TK, w_NK.t(), out=y_TN), device, least)


def _scaled_products(sizes: Sizes, device: torch.device, least: float) -> float:
    def drawn(rows: int) -> Fp8Rows:
        numbers = torch.randn(rows, sizes.inputs, device=device).to(torch.float8_e4m3fn)
        return Fp8Rows(numbers, torch.ones(rows, 1, device=device))

    x, w = drawn(sizes.tokens), drawn(sizes.outputs)
    return _flops(sizes) / seconds(lambda: scaled_product.product(x, w, torch.bfloat16), device, least)


def _flops(sizes: Sizes) -> int:
    return 2 * sizes.tokens * sizes.inputs * sizes.outputs


def _attention(sizes: Sizes, device: torch.device, dtype: torch.dtype, least: float) -> float:
    rows, form = rows_from_lengths([ROW] * sizes.rows, device), AttentionForm(sizes.head**-0.5)
    tokens = ROW * sizes.rows

    def drawn(heads: int) -> Tensor:
        return torch.randn(tokens, heads, sizes.head, device=device, dtype=dtype)

    q_THd, k_TGd, v_TGd, do_THd = drawn(sizes.heads), drawn(sizes.groups), drawn(sizes.groups), drawn(sizes.heads)

    def both() -> None:
        attended = attention_forward(q_THd, k_TGd, v_TGd, rows, form)
        attention_backward(do_THd, (q_THd, k_TGd, v_TGd), attended, rows, form, lambda *_: None)

    # Two products forward and five backward, of each row's half.
    return 7 * sizes.heads * sizes.head * ROW * tokens / seconds(both, device, least)


def _bandwidth(sizes: Sizes, device: torch.device, least: float) -> float:
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copied / seconds(lambda: target.copy_(source), device, least)


def _bus(sizes: Sizes, device: torch.device, least: float) -> tuple[float, float]:
    """To the device and from it, through pinned host memory."""
    here = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    host = torch.zeros(sizes.copied, dtype=torch.uint8).pin_memory()
    there = seconds(lambda: here.copy_(host, non_blocking=True), device, least)
    back = seconds(lambda: host.copy_(here, non_blocking=True), device, least)
    return sizes.copied / there, sizes.copied / back
