"""``kernels.swiglu``: the reference against float64, forward and hand-written backward against its autograd."""

import pytest
import torch
from torch import Tensor

from jebi.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = ((1, 1), (5, 176), (33, 131))
DTYPES = (torch.float32, torch.bfloat16)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and the output's gradient."""
    generator = torch.Generator().manual_seed(shape[1])
    gate, up, da = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return gate * 3, up, da


def exact(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.double(), up.double()
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_forward_against_float64(at_most_twice, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up, _ = inputs(shape, dtype)
    plain = gate * gate.sigmoid() * up
    at_most_twice("reference", swiglu(gate, up), plain, exact(gate, up))
    assert torch.equal(swiglu_forward(gate, up), swiglu(gate, up))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_against_the_reference(at_most_twice, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up, da = inputs(shape, dtype)
    plain = [x.clone().requires_grad_() for x in (gate, up)]
    fine = [x.double().requires_grad_() for x in (gate, up)]
    swiglu(*plain).backward(da)
    exact(*fine).backward(da.double())
    dgate, dup = swiglu_backward(da.clone(), gate, up)
    at_most_twice("dgate", dgate, plain[0].grad, fine[0].grad)
    at_most_twice("dup", dup, plain[1].grad, fine[1].grad)


def test_gate_and_up_are_left_alone() -> None:
    before = inputs((5, 176), torch.float32)
    gate, up, da = inputs((5, 176), torch.float32)
    swiglu_forward(gate, up)
    swiglu_backward(da, gate, up)
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


def test_saturated_gates_stay_finite() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    assert swiglu_forward(gate, torch.ones(1, 5)).tolist() == [[0.0, pytest.approx(0.0, abs=1e-40), 0.0, 100.0, 1e4]]
    assert all(x.isfinite().all() for x in swiglu_backward(torch.ones(1, 5), gate, torch.ones(1, 5)))
