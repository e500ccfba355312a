"""What matrices stored in blocks share: walking a matrix in pieces a cache holds, and moving without casting.

A block is a run of consecutive values, row after row; the formats themselves are `quant.nf4` and `quant.int8`.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def stretch(device: torch.device) -> int:
    """Values handled at a time: what a CPU's cache holds; elsewhere as many as keep launches few."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def unit(columns: int, block: int) -> int:
    """Every so many rows of a matrix with ``columns`` a row begins with a block."""
    return block // math.gcd(columns, block)


def stretches(out_NK: Tensor, block: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a matrix [N, K] into rows of about a stretch that begin with a block: ``(part of it, first block)``.

    Whole rows and whole blocks at a time, so that a part fits any strides of ``out_NK``.
    """
    rows, columns = out_NK.shape
    whole = unit(columns, block)
    step = max(1, stretch(out_NK.device) // max(1, whole * columns)) * whole
    for top in range(0, rows, step):
        yield out_NK[top : top + step], top * columns // block


def move_buffers(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply a move or cast of a module to its buffers: keep the move, drop the cast, which would round them."""
    for name, buffer in module.named_buffers():
        moved = fn(buffer)
        setattr(module, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
