"""The gated linear unit of the feed-forward block, ``act(gate) * up`` (arXiv:2002.05202): forward and backward.

With silu it is SwiGLU (Llama, Mistral, Qwen, Phi), with gelu GeGLU (Gemma).

Shapes: T tokens, F feed-forward width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""``x sigmoid(x)``; the tanh approximation of gelu (arXiv:1606.08415, section 2); gelu by the error function."""

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def glu(gate_TF: Tensor, up_TF: Tensor, activation: Activation) -> Tensor:
    """Reference, differentiable: rounded after the activation as transformers rounds."""
    return _activated(gate_TF, activation) * up_TF


def glu_forward(gate_TF: Tensor, up_TF: Tensor, activation: Activation) -> Tensor:
    """The same without a graph and with one new buffer."""
    return _activated(gate_TF, activation).mul_(up_TF)


def glu_backward(da_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. Writes over ``da_TF``, which must not be used afterwards."""
    dup_TF = _activated(gate_TF, activation).mul_(da_TF)
    da_TF.mul_(up_TF)
    if activation == "silu":
        return torch.ops.aten.silu_backward(da_TF, gate_TF), dup_TF
    return torch.ops.aten.gelu_backward(da_TF, gate_TF, approximate=_APPROXIMATE[activation]), dup_TF


def _activated(gate_TF: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate=_APPROXIMATE[activation])
