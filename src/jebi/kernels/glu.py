"""The gated linear unit of the feed-forward block, ``act(gate) * up`` (arXiv:2002.05202): forward and backward.

With silu it is SwiGLU (Llama, Mistral, Qwen, Phi), with gelu GeGLU (Gemma). ``scale`` is a factor on the product, taken
before anything is rounded or can overflow; why there is one, `nn.layer.stream_scale` says.

Shapes: T tokens, F feed-forward width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.kernels.low_rank import LowRank, added, summed

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""``x sigmoid(x)``; the tanh approximation of gelu (arXiv:1606.08415, section 2); gelu by the error function."""

_APPROXIMATE = {"gelu_tanh": "tanh", "gelu": "none"}


def glu(gate_TF: Tensor, up_TF: Tensor, activation: Activation, scale: float = 1.0) -> Tensor:
    """Reference, differentiable: rounded after the activation as transformers rounds."""
    act_TF = _activated(gate_TF, activation)
    return (act_TF if scale == 1 else act_TF * scale) * up_TF


Thin = tuple[LowRank | None, LowRank | None]
"""What is still to be added to gate and to up."""


def carries(rank: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `glu_forward` and `glu_backward_` take thin products of this rank: a card's kernels have to hold three.

    128 ranks in 16 bits are more than the shared memory of compute capability 8.6, 8.9 and 12.0, 64 than that of 7.5.
    """
    if device.type != "cuda":
        return True
    most = 128 if torch.cuda.get_device_capability(device) >= (8, 0) else 64
    return rank * dtype.itemsize <= most


def glu_forward(
    gate_TF: Tensor, up_TF: Tensor, activation: Activation, thin: Thin = (None, None), scale: float = 1.0
) -> Tensor:
    """The same without a graph and with one new buffer; rows may be strided."""
    if gate_TF.is_cuda:
        from jebi.kernels.gpu import glu as gpu

        out_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
        gpu.forward(gate_TF, up_TF, activation, out_TF, thin, scale)
        return out_TF
    return _scaled_(_activated(added(gate_TF, thin[0]), activation), scale).mul_(added(up_TF, thin[1]))


@dataclass(frozen=True)
class GluGrads:
    """What `glu_backward_` makes."""

    act_TF: Tensor | None
    """The gated product once more, where it was wanted."""
    gate_TF: Tensor
    """Gradient of the gate; likewise of up."""
    up_TF: Tensor
    sums: tuple[Tensor | None, Tensor | None, Tensor | None]
    """For gate's gradient, up's and the product: ``left^T`` times it (R, F), float32, where it had a thin share."""


def glu_backward_(
    da_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    activation: Activation,
    thin: Thin = (None, None),
    da_thin: LowRank | None = None,
    wants_act: bool = True,
    scale: float = 1.0,
) -> GluGrads:
    """Gradients of gate and up, and what of the adapters' gradients is a sum over tokens of what is at hand here.

    May write over the first three, which must not be used afterwards. ``da_thin`` is still to be added to ``da_TF``.
    """
    if da_TF.is_cuda:
        from jebi.kernels.gpu import glu as gpu

        sums = gpu.backward_(da_TF, gate_TF, up_TF, activation, thin, da_thin, wants_act, scale)
        return GluGrads(da_TF if wants_act else None, gate_TF, up_TF, sums)
    da_TF, gate_TF, up_TF = added(da_TF, da_thin), added(gate_TF, thin[0]), added(up_TF, thin[1])
    act_TF = _scaled_(_activated(gate_TF, activation), scale)
    dup_TF = act_TF * da_TF
    act_TF.mul_(up_TF)
    _scaled_(da_TF, scale).mul_(up_TF)
    if activation == "silu":
        dgate_TF = torch.ops.aten.silu_backward(da_TF, gate_TF)
    else:
        dgate_TF = torch.ops.aten.gelu_backward(da_TF, gate_TF, approximate=_APPROXIMATE[activation])
    sums = summed(thin[0], dgate_TF), summed(thin[1], dup_TF), summed(da_thin, act_TF)
    return GluGrads(act_TF if wants_act else None, dgate_TF, dup_TF, sums)


def _scaled_(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x.mul_(scale)


def _activated(gate_TF: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate_TF) if activation == "silu" else F.gelu(gate_TF, approximate=_APPROXIMATE[activation])
