"""``quant.scaled``: against transformers' own dequantisation where it has one, and scales that do not fit."""

import pytest
import torch
from transformers.integrations import finegrained_fp8

from jebi.errors import WeightsError
from jebi.quant.scaled import llm_int8, scaled

NUMBERS = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_as_transformers_scales_them(dtype: torch.dtype) -> None:
    theirs = getattr(finegrained_fp8, "Fp8Dequantize", None)
    if theirs is None or not hasattr(theirs, "_dequantize_one"):
        pytest.skip("this transformers dequantises fp8 elsewhere")
    scale = (torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    expected = theirs(None)._dequantize_one(NUMBERS, scale, torch.float32)
    assert torch.equal(scaled(NUMBERS, scale, (16, 32)), expected)


def test_powers_of_two_as_scales() -> None:
    scale = torch.tensor([[1.0, 2.0], [0.5, 4.0]]).to(torch.float8_e8m0fnu)
    dense = scaled(NUMBERS, scale, (32, 48))
    assert torch.equal(dense[:32, 48:], NUMBERS[:32, 48:].float() * 2)
    assert torch.equal(dense[32:, 48:], NUMBERS[32:, 48:].float() * 4)


@pytest.mark.parametrize(
    ("scale", "block", "message"),
    [
        (torch.ones(63), None, r"\[63\], which is neither one number nor one a row"),
        (torch.ones(64, 96), None, "neither one number nor one a row"),
        (torch.ones(64, 1), (32, 48), r"\[64, 1\], not one for each block of 32 by 48"),
        (torch.ones(64, dtype=torch.uint8), None, "dtype torch.uint8, not a floating one"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale: torch.Tensor, block: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        scaled(NUMBERS, scale, block)


def test_rows_without_scales_are_refused() -> None:
    with pytest.raises(WeightsError, match="64 rows, but scales for 3"):
        llm_int8(torch.zeros(64, 8, dtype=torch.int8), torch.ones(3))
