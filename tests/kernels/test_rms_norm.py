"""``kernels.rms_norm``: the reference against float64, forward and hand-written backward against its autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.kernels.rms_norm import rms_norm, rms_norm_apply, rms_norm_backward, rms_norm_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty")

EPS = 1e-5
SHAPES = ((1, 7), (5, 64), (33, 131))
DTYPES = (torch.float32, torch.bfloat16)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and the output's gradient."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, (1 + 0.1 * torch.randn(shape[-1], generator=generator)).to(dtype), dy


def exact(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 35)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_float64(at_most_twice, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, _ = inputs(shape, dtype)
    at_most_twice("y", rms_norm(x, weight, EPS), F.rms_norm(x, shape[-1:], weight, EPS), exact(x, weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_against_the_reference(at_most_twice, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight, dy = inputs(shape, dtype)
    y, rstd = rms_norm_forward(x, weight, EPS)
    assert (rstd.shape, rstd.dtype) == ((shape[0], 1), torch.float32)
    at_most_twice("y", y, rms_norm(x, weight, EPS), exact(x, weight))

    plain, fine = x.clone().requires_grad_(), x.double().requires_grad_()
    rms_norm(plain, weight, EPS).backward(dy)
    exact(fine, weight).backward(dy.double())
    at_most_twice("dx", rms_norm_backward(dy, x, rstd, weight), plain.grad, fine.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rebuilds_the_forward_to_the_bit(dtype: torch.dtype) -> None:
    x, weight, _ = inputs((33, 131), dtype)
    y, rstd = rms_norm_forward(x, weight, EPS)
    assert torch.equal(rms_norm_apply(x, rstd, weight), y)


def test_inputs_are_left_alone() -> None:
    before = inputs((5, 64), torch.float32)
    x, weight, dy = inputs((5, 64), torch.float32)
    _, rstd = rms_norm_forward(x, weight, EPS)
    rms_norm_backward(dy, x, rstd, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, dy), strict=True))


def test_rows_of_zeros_and_large_float16_stay_finite() -> None:
    x = torch.stack([torch.zeros(64), torch.full((64,), 6e4)]).half()
    y, rstd = rms_norm_forward(x, torch.ones(64).half(), EPS)
    assert y[0].eq(0).all()
    assert y[1].eq(1).all()
    assert rms_norm_backward(torch.ones_like(x), x, rstd, torch.ones(64).half()).isfinite().all()
