"""``quant.dynamic8`` against bitsandbytes: the code tables, and every byte of quantised blocks."""

import pytest
import torch

from jebi.quant import dynamic8


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("signed", [True, False])
def test_code_equals_bitsandbytes(functional, signed: bool) -> None:
    code = dynamic8.dynamic_code(signed)
    assert code.shape == (256,)
    assert code.dtype == torch.float32
    assert torch.equal(code, functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 100_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [True, False])
def test_bytes_equal_bitsandbytes(functional, signed: bool, dtype: torch.dtype, size: int) -> None:
    for scale in (1.0, 1e-6, 1e-30, 1e-39, 1e-42):  # the last two are subnormal in float32
        values = (scale * torch.randn(size, generator=torch.Generator().manual_seed(size))).to(dtype)
        values[::7] = 0.0
        expected, state = functional.quantize_blockwise(
            values, code=functional.create_dynamic_map(signed=signed), blocksize=256
        )
        codes, absmax = dynamic8.quantize(values, signed=signed)
        assert torch.equal(codes, expected)
        assert torch.equal(absmax, state.absmax)
        state.dtype = torch.float32
        dense = dynamic8.dequantize(codes, absmax, signed=signed)
        assert torch.equal(dense, functional.dequantize_blockwise(expected, state))


def test_rounding_at_every_grid_point_and_beside_it(functional) -> None:
    grid = torch.arange(65536, dtype=torch.float32) * (2 / 65535) - 1
    halves = grid + 1 / 65535
    values = torch.cat([grid, halves, halves.nextafter(grid), halves.nextafter(grid + 1)]).clamp(-1, 1)
    blocks = torch.cat([torch.ones(len(values) // 64, 1), values.view(-1, 64)], dim=1)  # 1 is the scale
    expected, _ = functional.quantize_blockwise(blocks.view(-1), blocksize=65)
    assert torch.equal(dynamic8.quantize(blocks.view(-1), block=65)[0], expected)


def test_keeps_shape_and_another_block_size(functional) -> None:
    values = torch.randn(30, 41).t()
    expected, state = functional.quantize_blockwise(values, blocksize=64)
    codes, absmax = dynamic8.quantize(values, block=64)
    assert codes.shape == (41, 30)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax, state.absmax)
    assert (dynamic8.dequantize(codes, absmax, block=64) - values).abs().max() < 0.02 * values.abs().max()


def test_block_of_zeros_comes_back_as_zeros() -> None:
    codes, absmax = dynamic8.quantize(torch.zeros(300))
    assert absmax.tolist() == [0.0, 0.0]
    assert dynamic8.dequantize(codes, absmax).count_nonzero() == 0


def test_nan_shows_in_its_block_alone() -> None:
    values = torch.ones(512)
    values[3] = torch.nan
    codes, absmax = dynamic8.quantize(values)
    dense = dynamic8.dequantize(codes, absmax)
    assert dense[:256].isnan().all()
    assert torch.equal(dense[256:], torch.ones(256))


def test_no_values() -> None:
    codes, absmax = dynamic8.quantize(torch.empty(0))
    assert codes.shape == absmax.shape == (0,)
    assert dynamic8.dequantize(codes, absmax).shape == (0,)
