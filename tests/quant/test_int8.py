"""``quant.int8``: the rounding written out value by value, its error bound, sizes, and how the module moves."""

import io

import pytest
import torch
from torch import Tensor

from jebi.errors import WeightsError
from jebi.quant.int8 import Int8Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks; a short last block; an odd row length; one value; more than a stretch.
SHAPES = ((128, 576), (33, 130), (65, 63), (1, 1), (500, 1000))


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 0.05) -> Tensor:
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight.view(-1)[70:200] = 0.0  # at least one block of zeros
    return weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_the_nearest_step_of_its_block(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for scale in (0.05, 1e-6, 0.0):
        weight = matrix(shape, dtype, scale)
        ours = Int8Weight.quantize(weight)
        assert (ours.shape, ours.dtype, ours.codes.dtype) == (shape, dtype, torch.int8)
        blocks = weight.double().view(-1).split(64)
        dense = ours.dense(torch.float32).view(-1).double().split(64)
        codes = ours.codes.split(64)
        for block, back, code, step in zip(blocks, dense, codes, ours.scales.double(), strict=True):
            largest = block.abs().max()
            # Half a step, and float32's rounding of the step and of the product.
            assert (back - block).abs().max() <= largest / 254 * (1 + 1e-4) + largest * 2**-22
            assert torch.equal(back, (code.double() * step).float().double())
            assert code.abs().max() == (127 if largest > 0 else 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_fills_a_slice_and_nothing_else(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ours = Int8Weight.quantize(matrix(shape))
    assert torch.equal(ours.dense(dtype), ours.dense(torch.float32).to(dtype))
    rows, columns = shape
    for larger in (torch.full((rows + 2, columns + 3), 7.0), torch.full((columns + 3, rows + 2), 7.0).t()):
        buffer = larger.to(dtype)
        inner = buffer[1:-1, 1:-2]
        assert ours.dense(dtype, out=inner) is inner
        assert torch.equal(inner, ours.dense(dtype))
        inner.fill_(7.0)
        assert (buffer == 7.0).all()


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes(block: int) -> None:
    weight = matrix((96, 130))
    ours = Int8Weight.quantize(weight, block)
    assert ours.scales.numel() == -(-96 * 130 // block)
    assert (ours.dense(torch.float32) - weight).abs().max() <= weight.abs().max() / 253


def test_subnormal_numbers_come_back_finite() -> None:
    for size in (1e-38, 1e-40, 1e-44, 1e-45):
        weight = matrix((4, 64), scale=size)
        dense = Int8Weight.quantize(weight).dense(torch.float32)
        # The step is subnormal itself, so it is off by up to half of the smallest number, 127 times.
        assert (dense - weight).abs().max() <= weight.abs().max() / 253 + 64 * 1.5e-45


def test_eight_and_a_half_bits_a_value() -> None:
    assert Int8Weight.quantize(matrix((256, 512))).nbytes == 256 * 512 * 17 // 16


def test_error_is_a_sixteenth_of_that_of_4_bits() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = Int8Weight.quantize(weight).dense(torch.float32) - weight
    # A step is 2.5 / 127 of a normal block's spread (its largest of 64 is about 2.5); uniform rounding: / sqrt(12).
    assert 0.004 < error.std() < 0.0075


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 149])
def test_weights_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    weight = matrix((3, 50))
    weight.view(-1)[place] = bad
    with pytest.raises(WeightsError, match="NaN or infinite"):
        Int8Weight.quantize(weight)


def test_transposed_weight_is_read_by_rows() -> None:
    weight = matrix((96, 128))
    assert torch.equal(Int8Weight.quantize(weight.t().contiguous().t()).codes, Int8Weight.quantize(weight).codes)


def test_casts_leave_the_buffers_alone_and_moves_do_not() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), Int8Weight.quantize(matrix((40, 64))))
    expected = module[1].dense(torch.float32)
    for cast in (module.half, module.bfloat16, module.double, lambda: module.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(module[1].dense(torch.float32), expected)
        assert module[1].scales.dtype == torch.float32
    assert module[0].weight.dtype == torch.bfloat16
    module.to("meta", torch.float16)
    assert {buffer.device.type for buffer in module[1].buffers()} == {"meta"}


def test_state_dict_round_trip() -> None:
    weight = Int8Weight.quantize(matrix((256, 512)))
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    other = Int8Weight.quantize(torch.zeros(256, 512))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.dense(torch.float32), weight.dense(torch.float32))
    assert "shape=(256, 512)" in repr(other)
