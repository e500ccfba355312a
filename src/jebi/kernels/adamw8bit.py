"""One step of AdamW over a flat stretch of parameters, with 8-bit block-wise or float32 moments.

Plain torch on any device, in place on the tensors given. The method is "8-bit Optimizers via Block-wise
Quantization" (arXiv:2110.02861): moments are kept in the dynamic 8-bit code (signed for the first moment,
unsigned for the second) with one scale a block of 256, and are widened to float32 for the arithmetic. The
order of operations is that of bitsandbytes 0.50's AdamW8bit on CPU, so that results agree to the bit.

Which parameters, in what batches, and where the moments live is ``training.optimizer``'s business.

Shape suffixes: T values of a stretch, B its blocks of 256.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.quant import dynamic8

BLOCK = dynamic8.BLOCK
ZERO_CODE_1 = 127  # the code of 0 in the signed format, for the first moment
ZERO_CODE_2 = 0  # and in the unsigned format, for the second


@dataclass(frozen=True)
class Rates:
    """The scalars of one step: AdamW's settings, and ``step``, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


@dataclass(frozen=True)
class Moments8:
    """Both moments in 8 bits: ``state1``, ``state2`` uint8 [T]; ``absmax1``, ``absmax2`` float32 [B]."""

    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor


@dataclass(frozen=True)
class Moments32:
    """Both moments as float32 [T]."""

    state1: Tensor
    state2: Tensor


@torch.no_grad()
def adamw8bit_(param_T: Tensor, grad_T: Tensor, moments: Moments8, rates: Rates) -> None:
    """Update ``param_T`` and ``moments`` in place; blocks count from the start, the last may be short.

    ``param_T`` and ``grad_T`` are float32, bfloat16 or float16, contiguous [T]; the arithmetic is float32 and
    the parameter is rounded once. A NaN in the gradient reaches its parameter, and its block's scales.
    """
    if param_T.is_cuda:
        from jebi.kernels.gpu import adamw8bit as gpu

        states = moments.state1, moments.state2, moments.absmax1, moments.absmax2
        tables = (dynamic8.tables_on(True, param_T.device), dynamic8.tables_on(False, param_T.device))
        gpu.step_(param_T, grad_T, states, rates, tables)
        return
    adamw8bit_reference_(param_T, grad_T, moments, rates)


@torch.no_grad()
def adamw8bit_reference_(param_T: Tensor, grad_T: Tensor, moments: Moments8, rates: Rates) -> None:
    """Reference, the same in plain torch."""
    first = dynamic8.dequantize(moments.state1, moments.absmax1, signed=True)
    second = dynamic8.dequantize(moments.state2, moments.absmax2, signed=False)
    _fold(first, second, grad_T.float(), rates)
    correction1, correction2 = _corrections(rates)
    divisor = second.sqrt().div_(correction2).add_(rates.eps)
    param = _decayed(param_T, rates).addcdiv_(first, divisor, value=-rates.lr / correction1)
    if param is not param_T:
        param_T.copy_(param)
    for moment, signed, codes, absmax_B in (
        (first, True, moments.state1, moments.absmax1),
        (second, False, moments.state2, moments.absmax2),
    ):
        new_codes, new_absmax_B = dynamic8.quantize(moment, signed=signed)
        codes.copy_(new_codes)
        absmax_B.copy_(new_absmax_B)


@torch.no_grad()
def adamw32_(param_T: Tensor, grad_T: Tensor, moments: Moments32, rates: Rates) -> None:
    """As ``adamw8bit_``, with float32 moments: what tensors too small for 8 bits get."""
    _fold(moments.state1, moments.state2, grad_T.float(), rates)
    correction1, correction2 = _corrections(rates)
    divisor = moments.state2.sqrt().add_(rates.eps * correction2)
    param = _decayed(param_T, rates)
    param.add_(moments.state1 / divisor, alpha=-rates.lr * correction2 / correction1)
    if param is not param_T:
        param_T.copy_(param)


def _fold(first_T: Tensor, second_T: Tensor, grad_T: Tensor, rates: Rates) -> None:
    first_T.mul_(rates.beta1).add_(grad_T, alpha=1.0 - rates.beta1)
    second_T.mul_(rates.beta2).addcmul_(grad_T, grad_T, value=1.0 - rates.beta2)


def _corrections(rates: Rates) -> tuple[float, float]:
    """Return the bias corrections of the first moment and of the second's square root (arXiv:1412.6980)."""
    return 1.0 - rates.beta1**rates.step, math.sqrt(1.0 - rates.beta2**rates.step)


def _decayed(param_T: Tensor, rates: Rates) -> Tensor:
    """Return the parameter as float32 (itself, if it is) after decoupled weight decay (arXiv:1711.05101)."""
    param = param_T.float()
    return param.mul_(1.0 - rates.lr * rates.weight_decay) if rates.weight_decay > 0.0 else param
