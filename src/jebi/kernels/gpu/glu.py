"""The gated linear unit: forward, and a backward that reuses all three of its inputs' memory.

Shapes: T tokens, F feed-forward width. Rows may be strided; values within a row are contiguous.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def forward(gate_TF: Tensor, up_TF: Tensor, activation: str, out_TF: Tensor) -> None:
    """Write ``act(gate) * up`` into ``out_TF``."""
    tokens, width = gate_TF.shape
    _forward[(tokens, triton.cdiv(width, _BLOCK))](
        gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0), out_TF.stride(0), width,
        KIND=_KINDS[activation], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def backward_(da_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> None:
    """Put ``act(gate) * up`` into ``da_TF``, the gate's gradient into ``gate_TF`` and up's into ``up_TF``."""
    tokens, width = gate_TF.shape
    _backward[(tokens, triton.cdiv(width, _BLOCK))](
        da_TF, gate_TF, up_TF, da_TF.stride(0), gate_TF.stride(0), up_TF.stride(0), width,
        KIND=_KINDS[activation], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit
def _activated(gate, KIND: tl.constexpr):
    """The activation and its slope."""
    if KIND == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        act = gate * sigmoid
        slope = sigmoid + act * (1.0 - sigmoid)
    elif KIND == 1:
        # (1 + tanh(x)) / 2 is the logistic function of 2 x, which loses no digits near zero and overflows nowhere.
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
        act = gate * sigmoid
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = sigmoid + act * (1.0 - sigmoid) * inner_slope
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        act = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return act, slope


@triton.jit
def _forward(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, out_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, inside, other=0.0).to(tl.float32)
    act, _ = _activated(gate, KIND)
    # Rounded after the activation, as transformers rounds.
    act = act.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, (act * up).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    da_ptr, gate_ptr, up_ptr, da_stride, gate_stride, up_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    da = tl.load(da_ptr + row * da_stride + columns, inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, inside, other=0.0).to(tl.float32)
    act, slope = _activated(gate, KIND)
    rounded = act.to(da_ptr.dtype.element_ty).to(tl.float32)
    tl.store(gate_ptr + row * gate_stride + columns, (da * up * slope).to(gate_ptr.dtype.element_ty), inside)
    tl.store(up_ptr + row * up_stride + columns, (da * rounded).to(up_ptr.dtype.element_ty), inside)
    tl.store(da_ptr + row * da_stride + columns, (rounded * up).to(da_ptr.dtype.element_ty), inside)
