"""``kernels.adamw8bit`` against bitsandbytes' own update functions on CPU, and against AdamW in float64."""

import math

import pytest
import torch
from torch import Tensor

from jebi.kernels import adamw8bit
from jebi.kernels.adamw8bit import Moments8, Moments32, Rates, adamw8bit_, adamw32_
from jebi.quant import dynamic8

SIZE = 5000  # the last block is short
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes").functional


def rates(step: int, weight_decay: float = 0.1) -> Rates:
    return Rates(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=weight_decay, step=step)


def empty_moments8(size: int = SIZE) -> Moments8:
    codes = torch.zeros(2, size, dtype=torch.uint8)
    scales = torch.zeros(2, -(-size // 256))
    return Moments8(codes[0], codes[1], scales[0], scales[1])


def random(step: int, dtype: torch.dtype = torch.float32, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step)).to(dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_step_equals_bitsandbytes(functional, dtype: torch.dtype, weight_decay: float) -> None:
    ours, theirs = random(0, dtype), random(0, dtype)
    mine, other = empty_moments8(), empty_moments8()
    for step in range(1, 21):
        grad = random(step, dtype)
        now = rates(step, weight_decay)
        adamw8bit_(ours, grad, mine, now)
        functional.optimizer_update_8bit_blockwise(
            "adam", grad, theirs, other.state1, other.state2, now.beta1, now.beta2, 0.0, 0.0, now.eps, step,
            now.lr, dynamic8.dynamic_code(True), dynamic8.dynamic_code(False), other.absmax1, other.absmax2,
            weight_decay=weight_decay,
        )  # fmt: skip
        assert torch.equal(ours, theirs)
        for name, tensor in vars(mine).items():
            assert torch.equal(tensor, getattr(other, name)), (step, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_32_bit_step_equals_bitsandbytes(functional, dtype: torch.dtype) -> None:
    ours, theirs = random(0, dtype), random(0, dtype)
    mine, other = Moments32(*torch.zeros(2, SIZE)), Moments32(*torch.zeros(2, SIZE))
    for step in range(1, 21):
        grad, now = random(step, dtype), rates(step)
        adamw32_(ours, grad, mine, now)
        functional.optimizer_update_32bit(
            "adam", grad, theirs, other.state1, now.beta1, now.eps, step, now.lr, other.state2, now.beta2,
            weight_decay=now.weight_decay,
        )  # fmt: skip
        assert torch.equal(ours, theirs)
        assert torch.equal(mine.state1, other.state1)
        assert torch.equal(mine.state2, other.state2)


def test_32_bit_step_is_adamw() -> None:
    param = random(0).double()
    first, second = torch.zeros(2, SIZE, dtype=torch.float64)
    ours, moments = random(0), Moments32(*torch.zeros(2, SIZE))
    for step in range(1, 11):
        grad = random(step).double()
        adamw32_(ours, random(step), moments, rates(step))
        first = 0.9 * first + 0.1 * grad
        second = 0.95 * second + 0.05 * grad**2
        ratio = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        param = param * (1 - 1e-2 * 0.1) - 1e-2 * ratio
    torch.testing.assert_close(ours.double(), param, rtol=1e-5, atol=1e-6)


def test_8_bit_moments_follow_float32_ones() -> None:
    coarse, fine = random(0), random(0)
    moments8, moments32 = empty_moments8(), Moments32(*torch.zeros(2, SIZE))
    for step in range(1, 11):
        adamw8bit_(coarse, random(step), moments8, rates(step))
        adamw32_(fine, random(step), moments32, rates(step))
    moved = (fine - random(0)).norm()
    assert (coarse - fine).norm() < 0.05 * moved


def test_zero_codes_stand_for_zero() -> None:
    assert dynamic8.dynamic_code(True)[adamw8bit.ZERO_CODE_1] == 0.0
    assert dynamic8.dynamic_code(False)[adamw8bit.ZERO_CODE_2] == 0.0


def test_nan_gradient_reaches_the_parameter() -> None:
    param, moments, grad = torch.ones(512), empty_moments8(512), torch.ones(512)
    grad[300] = math.nan
    adamw8bit_(param, grad, moments, rates(1))
    assert param.isnan().nonzero().flatten().tolist() == [300]
    adamw8bit_(param, torch.ones(512), moments, rates(2))
    assert param[256:].isnan().all()
    assert param[:256].isfinite().all()
