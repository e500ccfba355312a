"""The memory a training may take of the present device, and keeping torch's allocator to it.

How a budget is written is `plan.budget`'s; what a training takes, `planning`'s.
"""

import contextlib
from collections.abc import Iterator

import psutil
import torch

from jebi.models.device import free_bytes
from jebi.plan.budget import FREE, budget_bytes
from jebi.plan.inventory import CONTEXT_BYTES
from jebi.plan.present import memory_of


def allowed_bytes(device: torch.device, budget: float | str | None) -> int:
    """Memory that this process could still take, within a budget as `plan.budget` reads it.

    Raises:
        ConfigError: the budget is none.
    """
    free = free_bytes(device)
    if budget in (None, FREE):
        return free
    if device.type == "cuda":
        whole = budget_bytes(budget, memory_of(device)) - CONTEXT_BYTES
        return min(free, whole - torch.cuda.memory_allocated(device))
    return min(free, budget_bytes(budget, memory_of(device)) - psutil.Process().memory_info().rss)


@contextlib.contextmanager
def within(device: torch.device, budget: float | str | None) -> Iterator[None]:
    """Within it torch's allocator on a card takes no more than the budget, less what CUDA's context takes."""
    if budget in (None, FREE) or device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    share = max(0, budget_bytes(budget, memory_of(device)) - CONTEXT_BYTES) / memory_of(device)
    torch.cuda.set_per_process_memory_fraction(min(before, share), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
