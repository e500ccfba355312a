"""``kernels.rope``: tables and rotation against float64, the opposite rotation as gradient, and what rotation means."""

import pytest
import torch
from torch import Tensor

from jebi.kernels.rope import rope, rope_tables

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = ((1, 1, 2), (7, 3, 16), (5, 2, 6))  # tokens, heads, head size
DTYPES = (torch.float32, torch.bfloat16)


def frequencies(size: int) -> Tensor:
    return 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads, their gradient, and the tables of positions 3, 4, 5, ..."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, dy, *rope_tables(torch.arange(3, 3 + shape[0]), frequencies(shape[-1]), 1.0, dtype)


def by_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Plain torch in another form: coordinate i turns with coordinate i + d / 2."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (table[:, None, : a.shape[-1]] for table in (cos, sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def test_tables_against_float64() -> None:
    positions, inv_freq = torch.tensor([[0, 1, 2], [100, 2047, 8191]]), frequencies(16)
    angles = (positions[..., None].double() * inv_freq.double()).repeat(1, 1, 2)
    for table, exact in zip(rope_tables(positions, inv_freq, 1.25, torch.float32), (angles.cos(), angles.sin())):
        assert table.shape == (2, 3, 16)
        # A float32 angle is rounded once (half of 2**-23 of its size), and so is what the table makes of it.
        bar = 1.25 * (angles.abs() * 2**-24 + 2**-23)
        assert ((table.double() - 1.25 * exact).abs() <= bar).all()
    assert rope_tables(positions, inv_freq, 1.0, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_and_its_gradient(at_most_twice, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, dy, cos, sin = inputs(shape, dtype)
    fine = x.double().requires_grad_()
    exact = by_pairs(fine, cos.double(), sin.double())
    exact.backward(dy.double())
    at_most_twice("y", rope(x, cos, sin), by_pairs(x, cos, sin), exact.detach())
    plain = x.clone().requires_grad_()
    rope(plain, cos, sin).backward(dy)
    at_most_twice("dx", rope(dy, cos, -sin), plain.grad, fine.grad)


@pytest.mark.parametrize("size", [2, 6, 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_tables_turn_the_first_dimensions_alone(at_most_twice, dtype: torch.dtype, size: int) -> None:
    x, dy, _, _ = inputs((5, 3, 16), dtype)
    cos, sin = rope_tables(torch.arange(3, 8), frequencies(size), 1.0, dtype)
    fine = x[..., :size].double().requires_grad_()
    exact = by_pairs(fine, cos.double(), sin.double())
    exact.backward(dy[..., :size].double())
    y, dx = rope(x, cos, sin), rope(dy, cos, -sin)
    at_most_twice("y", y[..., :size], by_pairs(x[..., :size], cos, sin), exact.detach())
    assert torch.equal(y[..., size:], x[..., size:])
    plain = x.clone().requires_grad_()
    rope(plain, cos, sin).backward(dy)
    assert torch.equal(dx, plain.grad)
    at_most_twice("dx", dx[..., :size], plain.grad[..., :size], fine.grad)
    assert torch.equal(dx[..., size:], dy[..., size:])


def test_leading_dimensions_are_free() -> None:
    x, _, cos, sin = inputs((7, 3, 16), torch.float32)
    batch = rope(torch.stack([x, 2 * x]), torch.stack([cos, cos]), torch.stack([sin, sin]))
    assert torch.equal(batch[0], rope(x, cos, sin))
    assert torch.equal(batch[1], rope(2 * x, cos, sin))
    shared = rope(torch.stack([x, 2 * x]), cos[None], sin[None])
    assert torch.equal(shared, batch)


def test_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def product(at_q: int, at_k: int) -> float:
        tables = [rope_tables(torch.tensor([at]), frequencies(16).double(), 1.0, torch.float64) for at in (at_q, at_k)]
        return (rope(q, *tables[0]) * rope(k, *tables[1])).sum().item()

    assert product(0, 0) == pytest.approx((q * k).sum().item(), rel=1e-12)
    # Positions pass through float32, which holds them exactly; everything else is float64.
    assert product(107, 100) == pytest.approx(product(7, 0), rel=1e-10)
    assert product(107, 100) != pytest.approx(product(100, 107), rel=1e-3)
