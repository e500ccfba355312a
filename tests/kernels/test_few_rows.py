"""``kernels.few_rows``: maps laid below each other, and the product. The kernels' test is gpu/parity_decoding.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jebi.kernels import few_rows
from jebi.kernels.glu import glu
from jebi.kernels.low_rank import LowRank
from jebi.kernels.rms_norm import rms_norm
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(weight: few_rows.Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dense(torch.float32)


@pytest.mark.parametrize("rows", [(256, 512, 40), (7, 256, 9)])
@pytest.mark.parametrize("kind", [NF4Weight.quantize, Int8Weight.quantize, nn.Parameter])
def test_maps_below_each_other_are_the_same_maps(rows, kind) -> None:
    weights = [kind(drawn(count, 64, seed=count)) for count in rows]
    before = torch.cat([dense(weight).detach().clone() for weight in weights])
    stack = few_rows.stacked(weights)
    assert stack is not None
    assert stack.shape == (sum(rows), 64)
    assert torch.equal(dense(stack), before)
    # Nothing large is held twice: the maps' own bytes are the stack's.
    assert torch.equal(torch.cat([dense(weight).detach() for weight in weights]), before)
    large = stack if isinstance(stack, Tensor) else stack.codes
    memory = large.untyped_storage().data_ptr()
    for weight in weights:
        own = weight if isinstance(weight, Tensor) else weight.packed if hasattr(weight, "packed") else weight.codes
        assert own.untyped_storage().data_ptr() == memory


def test_one_map_is_not_copied() -> None:
    weight = NF4Weight.quantize(drawn(9, 64))
    stack = few_rows.stacked([weight])
    assert isinstance(stack, few_rows.Stack)
    assert stack.codes.data_ptr() == weight.packed.data_ptr()


def test_what_no_kernel_reads_is_not_stacked() -> None:
    nf4, int8 = NF4Weight.quantize(drawn(4, 64)), Int8Weight.quantize(drawn(4, 64))
    for weights in (
        [NF4Weight.quantize(drawn(4, 96))],
        [NF4Weight.quantize(drawn(4, 64), block=32)],
        [nf4, int8],
        [nf4, drawn(4, 64)],
        [int8, drawn(4, 64)],
        [drawn(4, 60)],
        [drawn(64, 4).t()],
        [drawn(4, 64), drawn(4, 64).bfloat16()],
    ):
        assert few_rows.stacked(weights) is None


def test_product_is_the_maps_with_all_that_follows() -> None:
    weight, x, bias = drawn(12, 64), drawn(3, 64, seed=1), drawn(12, seed=2)
    left, right = drawn(3, 5, seed=3), drawn(12, 5, seed=4)
    y = F.linear(x, weight, bias) + left @ right.t()
    thin = LowRank(left, right.t())
    torch.testing.assert_close(few_rows.product(x, weight, bias, thin, residual=y), 2 * y)
    for activation in few_rows.ACTIVATIONS:
        expected = glu(y[:, :6], y[:, 6:], activation) * 0.5 + x[:, :6]
        torch.testing.assert_close(few_rows.product(x, weight, bias, thin, activation, 0.5, x[:, :6]), expected)


def test_norm_and_down() -> None:
    x, weight, down = drawn(3, 64), drawn(64, seed=1), drawn(5, 64, seed=2)
    for unit_offset in (False, True):
        y, xa = few_rows.normed_and_compressed(x, (weight, 1e-5, unit_offset), down)
        assert torch.equal(y, rms_norm(x, weight, 1e-5, unit_offset))
        assert torch.equal(xa, y @ down.t())
    assert few_rows.normed_and_compressed(x, None, None) == (x, None)
