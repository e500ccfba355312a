"""``nn.fp8_product``: both products of a group equal the reference's numbers, however its weights are stored."""

import pytest
import torch
from torch import Tensor, nn

from jebi.kernels.scaled_product import product
from jebi.nn.base_product import DenseProduct, Scratch
from jebi.nn.fp8_product import Fp8Product
from jebi.nn.group import Stacked
from jebi.nn.linear import Linear
from jebi.nn.lora import Lora
from jebi.quant.fp8 import quantize_rows
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")

INPUTS, SIZES = 80, (64, 32, 32)
STORAGES: dict[str, list[type[NF4Weight | Int8Weight] | None]] = {
    "dense": [None] * 3,
    "4 bits": [NF4Weight] * 3,
    "8 bits": [Int8Weight] * 3,
    "mixed": [NF4Weight, None, Int8Weight],
}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def maps(storage: str) -> list[Linear]:
    made = []
    for seed, (size, kind) in enumerate(zip(SIZES, STORAGES[storage])):
        linear = Linear(INPUTS, size, False, torch.bfloat16)
        weight = drawn(size, INPUTS, seed=seed) * INPUTS**-0.5 * (1 + seed)
        linear.store(kind.quantize(weight) if kind else nn.Parameter(weight, requires_grad=False))
        made.append(linear)
    return made


def whole(group: list[Linear]) -> Tensor:
    """All weights below each other in float32."""
    return torch.cat(
        [
            linear.weight.float() if isinstance(linear.weight, nn.Parameter) else linear.weight.dense(torch.float32)
            for linear in group
        ]
    )


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "at every use"])
@pytest.mark.parametrize("storage", STORAGES)
def test_products_are_the_reference_s(storage: str, keep: bool) -> None:
    group = maps(storage)
    fp8, weight = Fp8Product(group, None if keep else Scratch()), whole(group)
    x, dy, residual = drawn(21, INPUTS, seed=7), drawn(21, sum(SIZES), seed=8), drawn(21, sum(SIZES), seed=9)
    forward = product(quantize_rows(x), quantize_rows(weight), torch.bfloat16)
    backward = product(quantize_rows(dy), quantize_rows(weight.t()), torch.bfloat16)
    for _ in range(2):  # the buffer has the other copy by then
        assert torch.equal(fp8.forward(x), forward)
        assert torch.equal(fp8.backward(dy), backward)
    assert torch.equal(fp8.forward(x, residual), forward + residual)
    assert torch.equal(residual, drawn(21, sum(SIZES), seed=9))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "at every use"])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_backward_alone(storage: str, keep: bool) -> None:
    group = maps(storage)
    weight, scratch = whole(group), None if keep else Scratch()
    fp8, dense = Fp8Product(group, scratch, forward=False), DenseProduct(maps(storage), None)
    x, dy, residual = drawn(21, INPUTS, seed=7), drawn(21, sum(SIZES), seed=8), drawn(21, sum(SIZES), seed=9)
    backward = product(quantize_rows(dy), quantize_rows(weight.t()), torch.bfloat16)
    for _ in range(2):  # the buffer has the other form by then
        assert torch.equal(fp8.forward(x, residual), dense.forward(x, residual))
        assert torch.equal(fp8.backward(dy), backward)
    if storage == "dense":  # moved, not copied
        assert fp8.kept() is not None
        assert group[1].weight.data_ptr() == fp8.kept()[SIZES[0] :].data_ptr()


def test_packed_weights_share_the_buffer() -> None:
    """One buffer, a byte a number, serves every group and both copies; what is dense needs none."""
    scratch = Scratch()
    for storage in ("dense", "4 bits", "8 bits"):
        fp8 = Fp8Product(maps(storage), scratch)
        fp8.forward(drawn(3, INPUTS))
        fp8.backward(drawn(3, sum(SIZES)))
        assert (scratch._flat is None) == (storage == "dense")
        assert scratch._flat is None or scratch._flat.nbytes == INPUTS * sum(SIZES)


def test_a_group_adds_its_adapters_and_biases_to_it() -> None:
    """Adapters see the inputs and gradients as they are, not those in 8 bits."""
    group = maps("4 bits")
    for linear in group:
        linear.lora = Lora(INPUTS, linear.out_features, 4, 0.5, 0.0, torch.device("cpu"))
        linear.lora.reset(torch.Generator().manual_seed(1))
        nn.init.normal_(linear.lora.B_Nr, std=0.5)
        linear.bias = nn.Parameter(drawn(linear.out_features, seed=3), requires_grad=False)
    base = Fp8Product(group, None)
    stacked = Stacked(group, base)
    x, dy = drawn(21, INPUTS, seed=7), drawn(21, sum(SIZES), seed=8)
    down = torch.cat([linear.lora.down(torch.bfloat16) for linear in group])
    up = torch.block_diag(*(linear.lora.up(torch.bfloat16) for linear in group))
    (y,), kept = stacked.forward(x)
    expected = base.forward(x) + torch.cat([linear.bias for linear in group])
    assert torch.equal(y, expected.addmm_(x @ down.t(), up.t()))
    dx, shares = stacked.backward_input([dy])
    assert torch.equal(dx, base.backward(dy).addmm_(dy @ up, down))
    grads: dict[nn.Parameter, Tensor] = {}
    stacked.backward_trained(shares, x, kept, grads)
    assert torch.equal(torch.cat([grads[linear.lora.A_rK] for linear in group]), ((dy @ up).t() @ x).float())
