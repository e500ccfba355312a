"""Programmatic dependent launch: a kernel of a row of small ones begins while the one before it ends.

From compute capability 9.0 on (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"). A kernel
that is launched so has to call `await_inputs` before it reads what kernels before it wrote, and before it writes
anything; every program of it, for the next kernel relies on it. What it may do earlier is read what no kernel writes:
weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ENABLED = True
"""False launches every kernel behind the end of the one before it; for measuring."""


def overlaps(x: Tensor) -> bool:
    """Whether kernels on ``x``'s device are launched so."""
    return ENABLED and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


@triton.jit
def let_next_begin():
    """Let the next kernel's programs take the room that this one's leave; to be called once all are under way."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs():
    """Wait until all kernels before this one are done and what they wrote is visible."""
    tl.extra.cuda.gdc_wait()
