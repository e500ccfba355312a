"""``quant.fp8``: the nearest numbers of e4m3 to every row, and rows at the edges of what floats hold."""

import pytest
import torch
from torch import Tensor

from jebi.quant.fp8 import LARGEST, Fp8Rows, numbers_of, quantize_rows, scale_of

EVERY = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
NUMBERS = EVERY[EVERY.isfinite()].unique()


def drawn(dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of many sizes, with values far below their row's largest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 131, generator=generator) ** 3 * 10 ** torch.linspace(-6, 4, 40)[:, None]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_the_nearest(dtype: torch.dtype) -> None:
    x = drawn(dtype)
    rows = quantize_rows(x)
    assert (rows.numbers_TK.dtype, rows.scale_T1.dtype, rows.scale_T1.shape) == (
        torch.float8_e4m3fn,
        torch.float32,
        (40, 1),
    )
    scaled = x.double() / rows.scale_T1
    away = (rows.numbers_TK.double() - scaled).abs()
    least = (scaled[..., None] - NUMBERS.double()).abs().amin(-1)
    # Where two are equally near but for the scale's rounding in float32, either is right.
    torch.testing.assert_close(away, least, rtol=0, atol=4 * torch.finfo(torch.float32).eps * LARGEST)


def test_error_of_a_value() -> None:
    """Half a step: a 16th of the value with 3 bits of mantissa, or of the subnormal numbers' step, 2**-9."""
    x = drawn()
    rows = quantize_rows(x)
    bound = torch.maximum(x.abs() / 16, rows.scale_T1 * 2**-10)
    assert ((rows.dense() - x).abs() <= bound * (1 + 1e-6)).all()
    assert torch.equal(rows.numbers_TK.float().abs().amax(1), torch.full((40,), LARGEST))


def test_what_e4m3_holds_stays_as_it_is() -> None:
    x = torch.stack([NUMBERS, NUMBERS * 2**-20, -NUMBERS * 2**15])
    assert torch.equal(quantize_rows(x).dense(), x)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-31])
def test_rows_of_zeros(value: float) -> None:
    """So are rows whose scale would have no inverse in float32."""
    x = torch.randn(3, 20)
    x[1] = value
    rows = quantize_rows(x)
    assert rows.scale_T1[1] == 1
    assert torch.equal(rows.dense()[1], torch.zeros(20))
    assert torch.equal(quantize_rows(x[:1]).dense(), rows.dense()[:1])


def test_nothing_overflows() -> None:
    largest = torch.tensor([[torch.finfo(torch.float32).max, 1.0, 1e-29]])
    assert quantize_rows(largest).dense().isfinite().all()
    assert torch.equal(
        numbers_of(torch.tensor([[1e9, -449.0, 3.0]]), torch.ones(1, 1)).float(), torch.tensor([[448.0, -448.0, 3.0]])
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    """A loss that diverged must be seen to."""
    x = torch.randn(2, 20)
    x[1, 3] = value
    dense = quantize_rows(x).dense()
    assert dense[1].isnan().any()
    assert dense[0].isfinite().all()


def test_scales_of_columns() -> None:
    x = drawn()
    scale_1K = scale_of(x.abs().amax(0, keepdim=True))
    turned = quantize_rows(x.t())
    assert torch.equal(numbers_of(x, scale_1K).t().float(), turned.numbers_TK.float())
    assert torch.equal(Fp8Rows(turned.numbers_TK, scale_1K.t()).dense(), turned.dense())
