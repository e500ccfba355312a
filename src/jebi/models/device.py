"""Where a model goes and what it computes in, when the user leaves it open, and the memory there."""

import os
from platform import release

import psutil
import torch

from jebi.config import launched


def default_device() -> torch.device:
    """The CUDA card where there is one, else the CPU.

    Under a launcher that starts a process a card (``LOCAL_RANK``), it is the process's own, or all models would be
    loaded onto the first one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    return torch.device("cuda", own if own < torch.cuda.device_count() else torch.cuda.current_device())


def device_of(asked: str | torch.device | None) -> torch.device:
    """The device that was asked for, with its number: "cuda" is the process's own card, and None `default_device`."""
    if asked is None:
        return default_device()
    device = torch.device(asked)
    return default_device() if device.type == "cuda" and device.index is None else device


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has it (Ampere and newer, CPUs with AVX512-BF16 or AMX), else float16 or float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Native products only: emulated ones are several times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take: of a host's, its share among the processes of a training there."""
    if device.type == "cuda":
        device = device_of(device)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        # What set_per_process_memory_fraction leaves.
        allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available) // launched.here()


def reserve_in_pages(device: torch.device) -> None:
    """From here on torch's allocator on a card maps memory in pages, which can be joined, parted and given back.

    By default what requests of one size leave does not serve another: 0.2 to 3.2 GiB of up to 20 lay idle in trainings
    on an H200, and nobody could predict how much. It concerns the whole process. Settings that the caller has made stay
    as they are, and WSL, whose driver fails at it, keeps the default. (torch's CUDA semantics, "expandable_segments".)
    """
    if device.type != "cuda" or torch.cuda.get_allocator_backend() != "native" or "microsoft" in release().lower():
        return
    # Older versions of torch tell nobody what their calls have set.
    told = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not (told() if told is not None else any(os.environ.get(name) for name in names)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
