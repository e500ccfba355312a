"""Launching a Triton kernel; or compiling it alone, which threads may do beside each other.

Triton (3.6) loads what it has compiled at the first launch, and a thread that launches it meanwhile finds half of it.
So one thread launches, and others only compile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_ALONE = ContextVar("whether kernels are only compiled", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **settings: object) -> None:
    """Launch a kernel over a grid with its arguments, constants and options; within `compiling` compile it for them."""
    if _ALONE.get():
        kernel.warmup(*arguments, grid=grid, **settings)
    else:
        kernel[grid](*arguments, **settings)


@contextmanager
def compiling() -> Iterator[None]:
    """Within it, in this thread, kernels are compiled and not launched: what they would write is anything."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)
