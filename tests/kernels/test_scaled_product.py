"""``kernels.scaled_product``: its reference against float64, torch's own scaled product, weights of every storage."""

import pytest
import torch
from torch import Tensor, nn

from jebi.kernels import scaled_product
from jebi.kernels.dequantize import PackedWeight, dense
from jebi.kernels.scaled_product import columns_into, largest, product, quantized, rows_into
from jebi.quant.fp8 import Fp8Rows, quantize_rows, scale_of
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")

STORAGES = ("dense", "nf4", "int8", "nf4 in blocks of 32")


def drawn(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(storage: str) -> PackedWeight | nn.Parameter:
    weight = drawn(48, 80, 1, torch.bfloat16)
    if storage == "dense":
        return nn.Parameter(weight, requires_grad=False)
    if storage == "int8":
        return Int8Weight.quantize(weight)
    return NF4Weight.quantize(weight, 64 if storage == "nf4" else 32)


def plain(weight: PackedWeight | nn.Parameter) -> Tensor:
    return weight.detach().float() if isinstance(weight, nn.Parameter) else dense(weight, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_against_float64(dtype: torch.dtype) -> None:
    x, w = drawn(33, 512, dtype=dtype), drawn(48, 512, 1, dtype)
    rows = quantized(x), quantize_rows(w)
    y = product(*rows, dtype)
    assert (y.shape, y.dtype) == ((33, 48), dtype)
    numbers = rows[0].dense().double() @ rows[1].dense().double().t()
    # Of the same numbers: roundings of sums of 512 products of order 1, which float32 keeps, and one to the dtype.
    torch.testing.assert_close(y.double(), numbers, rtol=torch.finfo(dtype).eps, atol=512 * 2**-24 * 4)
    exact, sizes = x.double() @ w.double().t(), x.double().square() @ w.double().square().t()
    # A number of e4m3 is off by u = 1/16 of itself at most, a product of two by 2u + u**2.
    assert ((y.double() - exact).abs() <= (2 / 16 + 1 / 256) * (x.double().abs() @ w.double().abs().t())).all()
    # Roundings are independent, each spread over u/sqrt(3) at most: their squares add up.
    assert ((y.double() - exact).square() / sizes).mean().sqrt() <= (2 / 3) ** 0.5 / 16


def test_torch_s_scaled_product_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that a card gets, on the CPU, which has it too."""
    rows = quantized(drawn(33, 64)), quantize_rows(drawn(48, 64, 1))
    reference = product(*rows, torch.bfloat16)
    monkeypatch.setattr(scaled_product, "served", lambda _: True)
    # Sums in another order: a rounding to bfloat16 may fall on the other side.
    torch.testing.assert_close(product(*rows, torch.bfloat16), reference, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_by_rows_and_by_columns(storage: str) -> None:
    weight = weight_of(storage)
    rows_N1, columns_K1 = largest(weight)
    for turned, fill, peaks in ((False, rows_into, rows_N1), (True, columns_into, columns_K1)):
        expected = quantize_rows(plain(weight).t() if turned else plain(weight))
        shape = expected.numbers_TK.shape
        out = torch.empty(shape[0], shape[1] + 16, dtype=torch.float8_e4m3fn)[:, : shape[1]]
        fill(weight, scale_of(peaks), out)
        assert torch.equal(scale_of(peaks), expected.scale_T1)
        assert torch.equal(out.float(), expected.numbers_TK.float())
        assert torch.equal(Fp8Rows(out, scale_of(peaks)).dense(), expected.dense())


def test_a_dense_weight_is_left_alone() -> None:
    weight = weight_of("dense")
    before = weight.detach().clone()
    largest(weight)
    rows_into(weight, torch.ones(48, 1), torch.empty(48, 80, dtype=torch.float8_e4m3fn))
    assert torch.equal(weight, before)


def test_a_cpu_is_not_served() -> None:
    assert not scaled_product.served(torch.device("cpu"))
