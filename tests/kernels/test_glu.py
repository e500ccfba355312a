"""``kernels.glu``: the reference against float64, forward and hand-written backward against its autograd."""

import math

import pytest
import torch
from torch import Tensor

from jebi.kernels.glu import Activation, glu, glu_backward_, glu_forward
from jebi.kernels.low_rank import LowRank

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = ((1, 1), (5, 176), (33, 131))
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and the output's gradient."""
    generator = torch.Generator().manual_seed(shape[1])
    gate, up, da = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    return gate * 3, up, da


def activated(gate: Tensor, activation: Activation) -> Tensor:
    """The activation written out."""
    if activation == "silu":
        return gate * gate.sigmoid()
    if activation == "gelu":
        return gate / 2 * (1 + torch.erf(gate / 2**0.5))
    return gate / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3)))


def exact(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return activated(gate.double(), activation) * up.double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_and_forward_against_float64(
    at_most_twice, dtype: torch.dtype, shape: tuple[int, int], activation: Activation
) -> None:
    gate, up, _ = inputs(shape, dtype)
    plain = activated(gate, activation) * up
    at_most_twice("reference", glu(gate, up, activation), plain, exact(gate, up, activation))
    assert torch.equal(glu_forward(gate, up, activation), glu(gate, up, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_against_the_reference(
    at_most_twice, dtype: torch.dtype, shape: tuple[int, int], activation: Activation
) -> None:
    gate, up, da = inputs(shape, dtype)
    plain = [x.clone().requires_grad_() for x in (gate, up)]
    fine = [x.double().requires_grad_() for x in (gate, up)]
    glu(*plain, activation).backward(da)
    exact(*fine, activation).backward(da.double())
    made = glu_backward_(da.clone(), gate, up, activation)
    assert torch.equal(made.act_TF, glu_forward(gate, up, activation))
    at_most_twice("dgate", made.gate_TF, plain[0].grad, fine[0].grad)
    at_most_twice("dup", made.up_TF, plain[1].grad, fine[1].grad)
    assert made.sums == (None, None, None)


def test_sums_are_the_gradients_of_the_thin_products() -> None:
    """Against autograd through the sums; float64, so only its own rounding is between them."""
    gate, up, da = (x.double() for x in inputs((5, 176), torch.float32))
    lefts = [torch.randn(5, rank, dtype=torch.float64) for rank in (2, 3, 4)]
    rights = [torch.randn(rank, 176, dtype=torch.float64, requires_grad=True) for rank in (2, 3, 4)]
    act = glu(gate + lefts[0] @ rights[0], up + lefts[1] @ rights[1], "silu")
    dact = da + lefts[2] @ rights[2].detach()
    expected = torch.autograd.grad(act, rights[:2], dact)
    thin = [LowRank(left, right.detach()) for left, right in zip(lefts, rights)]
    made = glu_backward_(da, gate, up, "silu", (thin[0], thin[1]), thin[2], wants_act=False)
    assert made.act_TF is None
    for ours, theirs in zip(made.sums, (*expected, lefts[2].t() @ act)):
        # Sums are handed out in float32.
        torch.testing.assert_close(ours, theirs.detach().float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_scale_is_taken_before_anything_overflows(at_most_twice, activation: Activation) -> None:
    gate, up, da = inputs((33, 131), torch.float16)
    gate, up, scale = 300 * gate, 300 * up, 2.0**-5
    fine = [x.double().requires_grad_() for x in (gate, up)]
    plain = [x.float().requires_grad_() for x in (gate, up)]
    (exact(*fine, activation) * scale).backward(da.double())
    (activated(plain[0], activation) * plain[1] * scale).backward(da.float())
    out = glu(gate, up, activation, scale)
    assert out.abs().max() > 65_504 * scale
    assert torch.equal(glu_forward(gate, up, activation, scale=scale), out)
    made = glu_backward_(da.clone(), gate, up, activation, scale=scale)
    assert torch.equal(made.act_TF, out)
    for name, ours, near, far in zip(("dgate", "dup"), (made.gate_TF, made.up_TF), plain, fine):
        at_most_twice(name, ours, near.grad.half(), far.grad)


def test_the_forward_leaves_gate_and_up_alone() -> None:
    before = inputs((5, 176), torch.float32)
    gate, up, _ = inputs((5, 176), torch.float32)
    glu_forward(gate, up, "silu")
    assert torch.equal(gate, before[0])
    assert torch.equal(up, before[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_gates_stay_finite(activation: Activation) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    out = glu_forward(gate, torch.ones(1, 5), activation)
    assert out.tolist() == [[0.0, pytest.approx(0.0, abs=1e-40), 0.0, 100.0, 1e4]]
    made = glu_backward_(torch.ones(1, 5), gate, torch.ones(1, 5), activation)
    assert all(x.isfinite().all() for x in (made.act_TF, made.gate_TF, made.up_TF))
