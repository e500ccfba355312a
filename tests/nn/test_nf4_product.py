"""``nn.nf4_product``: which rows go which way, by a product in the kernel's place; the kernel's test is its own."""

import pytest
import torch
from torch import Tensor

from jebi.kernels import nf4_on_cpu
from jebi.nn.base_product import DenseProduct, Scratch
from jebi.nn.linear import Linear
from jebi.nn.nf4_product import NF4Product, answering
from jebi.quant.nf4 import NF4Weight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(*rows: int) -> list[Linear]:
    made = []
    for seed, count in enumerate(rows):
        linear = Linear(64, count, False, torch.float32)
        linear.store(NF4Weight.quantize(drawn(count, 64, seed=seed)))
        made.append(linear)
    return made


@pytest.mark.parametrize("scratch", [None, Scratch()], ids=["kept", "at every use"])
def test_few_rows_go_one_way_and_more_the_other(scratch: Scratch | None) -> None:
    dense = DenseProduct(maps(20, 12), scratch)
    product = NF4Product(lambda x_MK: dense.forward(x_MK) * 2, dense)
    for count, factor in ((1, 2), (nf4_on_cpu.MOST, 2), (nf4_on_cpu.MOST + 1, 1)):
        x, residual = drawn(count, 64), drawn(count, 32, seed=1)
        expected = dense.forward(x) * factor
        assert torch.equal(product.forward(x), expected)
        torch.testing.assert_close(product.forward(x, residual), expected + residual)
        assert torch.equal(residual, drawn(count, 32, seed=1))
    dy = drawn(3, 32)
    assert torch.equal(product.backward(dy), dense.backward(dy))
    assert product.kept() is dense.kept()


def test_without_a_kernel_the_dense_product_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = maps(20, 12)
    dense = DenseProduct(group, None)
    monkeypatch.setattr(nf4_on_cpu, "available", lambda: False)
    assert answering(group, dense) is dense


@pytest.mark.skipif(not nf4_on_cpu.available(), reason="the CPU or bitsandbytes has no kernel for 4 bits")
def test_with_a_kernel_it_reads_these_maps() -> None:
    """Within bfloat16's rounding, for which `tests/kernels/test_nf4_on_cpu.py` has the bar."""
    group = maps(20, 12)
    dense = DenseProduct(group, None)
    product, x = answering(group, dense), drawn(2, 64)
    assert isinstance(product, NF4Product)
    assert (product.forward(x) - dense.forward(x)).norm() < 0.01 * dense.forward(x).norm()
