"""The gated activation of the feed-forward block, ``silu(gate) * up`` (arXiv:2002.05202): forward and backward.

Shapes: T tokens, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Reference, differentiable: ``silu(gate) * up``, rounded after the silu as transformers rounds."""
    return F.silu(gate_TF) * up_TF


def swiglu_forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The same without a graph and with one new buffer."""
    return F.silu(gate_TF).mul_(up_TF)


def swiglu_backward(da_TF: Tensor, gate_TF: Tensor, up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. Writes over ``da_TF``, which must not be used afterwards."""
    dup_TF = F.silu(gate_TF).mul_(da_TF)
    dgate_TF = torch.ops.aten.silu_backward(da_TF.mul_(up_TF), gate_TF)
    return dgate_TF, dup_TF
