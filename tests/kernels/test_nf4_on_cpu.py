"""``kernels.nf4_on_cpu``: bitsandbytes' kernel beside the exact product, and what happens where it is not."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from jebi.kernels import nf4_on_cpu
from jebi.kernels.nf4_on_cpu import MOST, product_of, product_reference
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

here = pytest.mark.skipif(not nf4_on_cpu.available(), reason="the CPU or bitsandbytes has no such kernel")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(*rows: int, columns: int = 192) -> list[NF4Weight]:
    """Of different magnitudes, so that each has scales and an offset of its own."""
    return [NF4Weight.quantize(drawn(count, columns, seed=count) * 2.0**n) for n, count in enumerate(rows)]


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(96,), (40, 17, 7), (64, 64)])
@pytest.mark.parametrize("count", [1, 3, MOST])
@torch.no_grad()
def test_the_product(rows: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    """``x``, level, scale, their product and the output are each rounded to bfloat16, by at most 2**-9 of themselves.

    So much a sum of magnitudes allows, 1 % for float32's own sums and products of two roundings. Over all, it is
    no further off than twice what torch's product in bfloat16 is.
    """
    weights = maps(*rows)
    x_MK = drawn(count, 192, seed=9).to(dtype)
    product = product_of(weights, dtype)
    assert product is not None
    y_MN = product(x_MK)
    assert (y_MN.dtype, y_MN.shape) == (dtype, (count, sum(rows)))
    exact_MN = product_reference(x_MK.double(), weights)
    magnitudes_MN = x_MK.double().abs() @ torch.cat([weight.dense(torch.float64) for weight in weights]).abs().t()
    off_MN = (y_MN.double() - exact_MN).abs()
    assert (off_MN <= 1.01 * 5 * 2.0**-9 * magnitudes_MN).all()
    torch_s_MN = product_reference(x_MK.bfloat16(), weights).double()
    assert off_MN.norm() <= 2 * (torch_s_MN - exact_MN).norm()


@here
@torch.no_grad()
def test_rows_do_not_know_of_each_other() -> None:
    product = product_of(maps(96), torch.bfloat16)
    assert product is not None
    x_MK = drawn(MOST, 192).bfloat16()
    y_MN = product(x_MK)
    for row in range(MOST):
        assert torch.equal(product(x_MK[row : row + 1])[0], y_MN[row])


@here
@torch.no_grad()
def test_the_maps_stay_what_they_were() -> None:
    weights = maps(40, 24)
    before = [{name: buffer.clone() for name, buffer in weight.named_buffers()} for weight in weights]
    product = product_of(weights, torch.float32)
    assert product is not None
    product(drawn(2, 192))
    for weight, buffers in zip(weights, before, strict=True):
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in weight.named_buffers())


def test_what_the_kernel_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_on_cpu, "available", lambda: True)
    dense = nn.Parameter(drawn(32, 192), requires_grad=False)
    for weights, dtype in (
        (maps(31), torch.float32),
        (maps(32, columns=96), torch.float32),
        ([NF4Weight.quantize(drawn(32, 192), block=32)], torch.float32),
        ([dense], torch.float32),
        ([*maps(32), dense], torch.float32),
        ([Int8Weight.quantize(drawn(32, 192))], torch.float32),
        (maps(32), torch.float16),
    ):
        assert product_of(weights, dtype) is None


@pytest.fixture
def asked_again() -> Iterator[None]:
    """`available` forgets what it has found out, before and after."""
    nf4_on_cpu.available.cache_clear()
    yield
    nf4_on_cpu.available.cache_clear()


@pytest.mark.usefixtures("asked_again")
@pytest.mark.parametrize("lacks", ["instructions", "bitsandbytes", "its kernel"])
def test_where_it_is_not(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: lacks != "instructions")
    if lacks == "bitsandbytes":
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    elif lacks == "its kernel":
        monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    assert not nf4_on_cpu.available()
    assert product_of(maps(32), torch.float32) is None
