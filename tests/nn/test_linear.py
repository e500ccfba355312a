"""``nn.linear``, ``nn.lora``: two ways through a map agree, 4-bit copies come and go, adapters start at nothing."""

import pytest
import torch
from torch import Tensor, nn

from jebi.nn import dora
from jebi.nn.linear import Grads, Linear, backward_input, backward_trained, project
from jebi.nn.lora import Lora
from jebi.quant.nf4 import NF4Weight

INPUTS, OUTPUTS, RANK, TOKENS = 33, 21, 4, 9


def build(nf4: bool = False, bias: bool = True, kind: str = "lora") -> Linear:
    linear = Linear(INPUTS, OUTPUTS, bias, torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator) * INPUTS**-0.5
    linear.store(NF4Weight.quantize(weight) if nf4 else nn.Parameter(weight, requires_grad=False))
    if bias:
        linear.bias = nn.Parameter(torch.randn(OUTPUTS, generator=generator))
    linear.lora = Lora(INPUTS, OUTPUTS, RANK, 0.5, 0.0, torch.device("cpu"))
    linear.lora.reset(generator)
    nn.init.normal_(linear.lora.B_Nr, generator=generator)
    if "frozen half" in kind:
        start = torch.randn(RANK, INPUTS, generator=generator), torch.randn(OUTPUTS, RANK, generator=generator)
        linear.lora.freeze_start(*start)
        nn.init.normal_(linear.lora.B_Nr, generator=generator)
    if "DoRA" in kind:
        dora.start(linear.lora, linear.dense())
        nn.init.normal_(linear.lora.magnitude_N, generator=generator)
    if kind == "trained weight":
        linear.weight.requires_grad_()
        linear.lora = None
    return linear


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("nf4", "kind", "trains"),
    [
        (True, "lora", 2),
        (False, "lora", 2),
        (False, "frozen half", 2),
        (True, "DoRA", 3),
        (False, "DoRA", 3),
        (True, "DoRA with a frozen half", 3),
        (False, "trained weight", 1),
    ],
)
def test_project_and_its_backward_equal_autograd(nf4: bool, kind: str, trains: int, bias: bool) -> None:
    x, dy = draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS)
    plain, ours = build(nf4, bias, kind), build(nf4, bias, kind)
    leaf = x.clone().requires_grad_()
    expected = plain(leaf)
    expected.backward(dy)

    y, xa = project(ours, x)
    grads: Grads = {}
    dx, share = backward_input(ours, dy)
    backward_trained(ours, dy, share, x, xa, grads)
    # Two float32 ways of summing 33 products of order 1.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, expected.detach(), **close)
    torch.testing.assert_close(dx, leaf.grad, **close)
    trained = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert len(trained) == len(grads) == trains + bias
    for name, parameter in trained.items():
        torch.testing.assert_close(grads[ours.get_parameter(name)], parameter.grad, **close)

    started = torch.ones_like(x)
    assert backward_input(ours, dy, started)[0] is started
    torch.testing.assert_close(started, leaf.grad + 1, **close)

    without_input: Grads = {}
    nothing, share = backward_input(ours, dy, wanted=False)
    assert nothing is None
    backward_trained(ours, dy, share, x, xa, without_input)
    assert without_input.keys() == grads.keys()
    assert all(torch.equal(without_input[parameter], grad) for parameter, grad in grads.items())


def test_row_lengths_of_the_adapted_weight() -> None:
    linear = build(nf4=True, kind="frozen half")
    lora = linear.lora
    change = 0.5 * (lora.B_Nr @ lora.A_rK + lora.frozen_B_Nr @ lora.frozen_A_rK)
    for weight in (linear.dense(), 2 * linear.dense()):
        linear.store(NF4Weight.quantize(weight))
        expected = (linear.dense() + change).norm(dim=1)
        # Squares of about 33 products are summed in another order, and a difference of two of them loses a digit.
        torch.testing.assert_close(dora.row_lengths(lora, linear.dense()), expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_has_no_direction() -> None:
    linear = build(bias=False)
    linear.store(nn.Parameter(linear.weight.detach().clone().index_fill_(0, torch.tensor([3]), 0), requires_grad=False))
    nn.init.zeros_(linear.lora.B_Nr)
    dora.start(linear.lora, linear.dense())
    y = linear(draw(TOKENS, INPUTS))
    assert torch.isfinite(y).all()
    assert not y[:, 3].any()


def test_a_dense_copy_is_kept_and_dropped() -> None:
    linear = build(nf4=True)
    fresh = linear.dense()
    assert linear.dense() is not fresh
    linear.keep_for_decoding(dense=True)
    assert linear.dense() is linear.dense()
    assert torch.equal(linear.dense(), fresh)
    linear.drop_kept()
    assert linear.dense() is not linear.dense()
    linear.keep_for_decoding(dense=False)
    assert linear.dense() is not linear.dense()
    dense = build()
    dense.keep_for_decoding(dense=True)
    assert dense.dense() is dense.weight


@pytest.mark.parametrize("kind", ["lora", "frozen half", "DoRA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_copies_answer_as_the_originals(dtype: torch.dtype, kind: str) -> None:
    linear = build(nf4=True, kind=kind)
    linear.dtype = dtype
    x = draw(2, TOKENS, INPUTS).to(dtype)
    with torch.no_grad():
        before = linear(x)
        linear.keep_for_decoding(dense=True)
        # The scale is rounded into B instead of multiplying the product: one rounding, of the largest value.
        torch.testing.assert_close(
            linear(x), before, rtol=0, atol=2 * torch.finfo(dtype).eps * before.abs().max().item()
        )


def test_gradients_reach_an_adapter_whose_copy_is_kept() -> None:
    plain, kept = build(), build()
    kept.keep_for_decoding(dense=True)
    x = draw(TOKENS, INPUTS)
    for linear in (plain, kept):
        linear(x).square().sum().backward()
    assert torch.equal(kept.lora.A_rK.grad, plain.lora.A_rK.grad)
    assert torch.equal(kept.lora.B_Nr.grad, plain.lora.B_Nr.grad)


def test_kept_copies_are_no_part_of_the_state() -> None:
    linear = build(nf4=True)
    before = set(linear.state_dict())
    linear.keep_for_decoding(dense=True)
    assert set(linear.state_dict()) == before


def test_an_adapter_starts_at_nothing_and_within_its_bound() -> None:
    lora = Lora(INPUTS, OUTPUTS, RANK, 0.5, 0.0, torch.device("cpu"))
    lora.reset(torch.Generator().manual_seed(3))
    first = lora.A_rK.detach().clone()
    assert lora(draw(TOKENS, INPUTS)).eq(0).all()
    # Kaiming-uniform with a = sqrt(5): sqrt(6 / (1 + 5) / inputs).
    bound = INPUTS**-0.5
    assert 0.8 * bound < first.abs().max() <= bound
    lora.reset(torch.Generator().manual_seed(3))
    assert torch.equal(lora.A_rK, first)
    lora.reset(torch.Generator().manual_seed(4))
    assert not torch.equal(lora.A_rK, first)


def test_dropout_drops_in_training_alone() -> None:
    lora = build().lora
    x = draw(200, INPUTS)
    lora.dropout = 0.5
    lora.eval()
    still = lora(x)
    assert torch.equal(lora(x), still)
    lora.train()
    torch.manual_seed(0)
    dropped = torch.stack([lora(x) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    # What is left is doubled, so the mean stays: of 400 draws it strays by a twentieth of one draw's spread, and
    # 4 times that is never seen among 4,200 values more than a few times.
    strayed = (dropped.mean(0) - still).abs() > 4 * dropped.std(0) / 20
    assert strayed.float().mean() < 0.002


def test_disabled_adapters_take_no_part() -> None:
    linear = build()
    assert linear.adapter is linear.lora
    linear.lora.enabled = False
    assert linear.adapter is None
    x = draw(TOKENS, INPUTS)
    expected = torch.addmm(linear.bias, x, linear.weight.t())
    assert torch.equal(project(linear, x)[0], expected)
    # One sum and one product apart, or fused.
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-6)
