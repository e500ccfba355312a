"""``kernels.rms_norm``: the reference against float64, forward and hand-written backward against its autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_lean,
    rms_norm_summed,
    rms_norm_weight_grad,
)

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


def test_a_gradient_in_place_of_its_residual() -> None:
    x, weight, dy = inputs((5, 64), torch.float32)
    residual, _, _ = inputs((5, 64), torch.float32)
    _, rstd = rms_norm_forward(x, weight, EPS)
    expected = rms_norm_backward(dy, x, rstd, weight, residual_TD=residual)
    out = rms_norm_backward(dy, x, rstd, weight, residual_TD=residual, out_TD=residual)
    assert out is residual
    assert torch.equal(out, expected)


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


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 35)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_weights_stored_less_one_and_trained_weights(
    at_most_twice, unit_offset: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight, dy = inputs(shape, dtype)
    stored = weight - 1 if unit_offset else weight
    y, rstd = rms_norm_forward(x, stored, EPS, unit_offset)

    def run(kind: torch.dtype) -> list[Tensor]:
        leaf, trained = (value.to(kind, copy=True).requires_grad_() for value in (x, stored))
        whole = trained + 1 if unit_offset else trained
        out = whole * leaf / (leaf.square().mean(-1, keepdim=True) + EPS).sqrt()
        out.backward(dy.to(kind))
        return [out.detach(), leaf.grad, trained.grad]

    leaf, trained = x.clone().requires_grad_(), stored.clone().requires_grad_()
    out = rms_norm(leaf, trained, EPS, unit_offset)
    out.backward(dy)
    ours = [y, rms_norm_backward(dy, x, rstd, stored, unit_offset), rms_norm_weight_grad(dy, x, rstd).to(dtype)]
    reference = [out.detach(), leaf.grad, trained.grad]
    leaf, trained = x.clone().requires_grad_(), stored.clone().requires_grad_()
    out = rms_norm_lean(leaf, trained, EPS, unit_offset)
    out.backward(dy)
    assert all(torch.equal(*pair) for pair in zip(ours, (out, leaf.grad, trained.grad), strict=True))
    for name, one, other, plain, fine in zip(("y", "dx", "dw"), ours, reference, run(dtype), run(torch.float64)):
        at_most_twice(name, one, plain, fine)
        at_most_twice(f"{name} of the reference", other, plain, fine)


def test_an_offset_weight_is_multiplied_before_rounding_as_gemmas() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    theirs = GemmaRMSNorm(64, 1e-6).bfloat16()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, 64, generator=generator).bfloat16() for shape in ((9,), ()))
    with torch.no_grad():
        theirs.weight.copy_(weight)
        assert torch.equal(rms_norm(x, weight, 1e-6, unit_offset=True), theirs(x))


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_summed_is_the_product_with_normed_tokens(at_most_twice, dtype: torch.dtype, unit_offset: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, left = (torch.randn(37, width, generator=generator).to(dtype) for width in (64, 5))
    weight = (torch.randn(64, generator=generator) * 0.1 + (0 if unit_offset else 1)).to(dtype)
    y, rstd = rms_norm_forward(x, weight, EPS, unit_offset)
    exact = (x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()) * (
        weight.double() + (1 if unit_offset else 0)
    )
    ours = rms_norm_summed(left, x, rstd, weight, unit_offset)
    at_most_twice("summed", ours, (left.t() @ y).float(), left.double().t() @ exact)
