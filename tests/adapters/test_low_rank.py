"""``adapters.low_rank``: the factors of a full singular value decomposition, and near ones."""

import pytest
import torch

from jebi.adapters.low_rank import best_factors, near_factors


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (48, 48)])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_best_factors(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    A, B = best_factors(matrix, rank)
    assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
    # The product of singular parts is well determined where their gap is; float32 loses what the gap divides by.
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert (B.double() @ A.double() - expected).norm() <= 1e-4 * expected.norm()
    # Each factor holds the roots of the singular values.
    torch.testing.assert_close((A @ A.t()).diagonal(), values[:rank].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((B.t() @ B).diagonal(), values[:rank].float(), rtol=1e-4, atol=1e-4)


def test_more_rounds_come_nearer_and_the_seed_decides() -> None:
    matrix = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()

    def miss(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        return (matrix - factors[1] @ factors[0]).norm().item()

    few, many = near_factors(matrix, 4, 1, 7), near_factors(matrix, 4, 30, 7)
    assert miss(best_factors(matrix, 4)) <= miss(many) * (1 + 1e-6) < miss(few)
    assert torch.equal(few[0], near_factors(matrix, 4, 1, 7)[0])
    assert not torch.equal(few[0], near_factors(matrix, 4, 1, 8)[0])
    assert torch.equal(torch.get_rng_state(), state)
