"""The present device as plans see it, asked of torch; `cli.machine` asks the driver, without torch."""

import psutil
import torch

from jebi.models.device import free_bytes
from jebi.plan.budget import FREE, budget_bytes
from jebi.plan.cards import Card
from jebi.plan.inventory import CONTEXT_BYTES
from jebi.plan.measured import known, known_processor


def memory_of(device: torch.device) -> int:
    """All memory of the device, taken or free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def card_of(device: torch.device) -> Card:
    """Its rates, by what was measured of it or is known of its kind."""
    if device.type != "cuda":
        return known_processor(memory_of(device))
    return known(torch.cuda.get_device_name(device), memory_of(device))


def available(device: torch.device, budget: float | str | None = None) -> int:
    """Bytes that a process with nothing loaded yet may take here in all, as predictions count them.

    Raises:
        ConfigError: the budget is none.
    """
    # CUDA's context, or Python and its libraries, are there by now, and are counted too.
    taken = CONTEXT_BYTES if device.type == "cuda" else int(psutil.Process().memory_info().rss)
    free = free_bytes(device) + taken
    return free if budget in (None, FREE) else min(free, budget_bytes(budget, memory_of(device)))


def host_bytes(device: torch.device) -> int:
    """Free bytes of host memory beside the device's, for this process."""
    return free_bytes(torch.device("cpu")) if device.type == "cuda" else 0


def named(device: torch.device) -> str:
    """What messages call it."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "this machine"
