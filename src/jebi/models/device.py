"""Where a model goes and what it computes in, when the user leaves it open."""

import torch


def default_device() -> torch.device:
    """The CUDA card where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware has it (Ampere and newer, CPUs with AVX512-BF16 or AMX), else float16 or float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Native products only: emulated ones are several times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
