"""``nn.slices``: together the slices are the weight, and products by slices are products by the weight."""

import pytest
import torch
from torch import Tensor, nn

from jebi.kernels import dequantize
from jebi.nn import slices as module
from jebi.nn.host_weight import HostWeight
from jebi.nn.slices import WeightSlices, sliced_product
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")

CPU = torch.device("cpu")
KINDS = {
    "host": lambda weight: HostWeight(weight, CPU),
    "nf4": NF4Weight.quantize,
    "int8": Int8Weight.quantize,
}


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def whole(weight: nn.Module) -> Tensor:
    if isinstance(weight, HostWeight):
        return weight.dense()
    assert isinstance(weight, NF4Weight | Int8Weight)
    return dequantize.dense(weight, torch.float32)


@pytest.mark.parametrize("limit", [1, 5000, 100_000, 10**9])
@pytest.mark.parametrize(("rows", "columns"), [(300, 64), (700, 96), (513, 33), (2, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_the_weight(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, columns: int, limit: int) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", limit)
    weight = KINDS[kind](drawn(rows, columns))
    slices = WeightSlices(weight, torch.float32)
    parts = [part.clone() for part in slices]
    assert torch.equal(torch.cat(parts), whole(weight))
    assert slices.vocabulary == rows
    assert all(len(part) == slices.most for part in parts[:-1])
    assert len(parts[-1]) <= slices.most <= rows
    if limit == 10**9:
        assert len(parts) == 1
    if (kind, limit) == ("host", 1):
        assert len(parts) == rows


def test_a_slice_of_4_bits_begins_where_block_scales_begin() -> None:
    assert NF4Weight.quantize(drawn(8, 4096)).unit == 4
    assert NF4Weight.quantize(drawn(8, 64)).unit == 256
    assert Int8Weight.quantize(drawn(8, 96)).unit == 2


def test_weights_without_double_quantisation_have_slices_too() -> None:
    double = NF4Weight.quantize(drawn(10, 64))
    single = NF4Weight(double.packed, double.scales().clone(), None, None, shape=(10, 64), dtype=torch.float32)
    assert single.unit == 1
    assert torch.equal(single.rows(3, 7).dense(torch.float32), double.dense(torch.float32)[3:7])


def test_a_product_of_nothing() -> None:
    x = torch.zeros(2, 0, 64, requires_grad=True)
    y = sliced_product(x, WeightSlices(HostWeight(drawn(5, 64), CPU), torch.float32))
    y.sum().backward()
    assert y.shape == (2, 0, 5)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_products_by_slices(at_most_twice, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 40_000)
    weight = KINDS[kind]((drawn(600, 64) / 8).to(dtype))
    dense = whole(weight).to(dtype)
    results = []
    for kind_of in (dtype, dtype, torch.float64):
        x = drawn(10, 64, 1).view(2, 5, 64).to(dtype).to(kind_of).requires_grad_()
        y = sliced_product(x, WeightSlices(weight, dtype)) if not results else x @ dense.to(kind_of).t()
        (y * drawn(10, 600, 2).view(2, 5, 600).to(dtype)).sum().backward()
        results.append((y.detach(), x.grad))
    for name, values in zip(("y", "dx"), zip(*results)):
        at_most_twice(name, *values)
