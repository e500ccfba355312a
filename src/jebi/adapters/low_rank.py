"""The best low-rank factors of a matrix, as PiSSA and LoftQ start from them.

Shapes: N rows, K columns, M the smaller of them, r rank.
"""

import torch
from torch import Tensor

from jebi.errors import ConfigError
from jebi.nn.linear import Linear


def require_rank(path: str, linear: Linear, method: str) -> int:
    """The rank of the adapter of the projection at ``path``, which is to start at parts of that rank.

    Raises:
        ConfigError: the projection's weight has no such rank.
    """
    assert linear.lora is not None
    rank, most = linear.lora.A_rK.shape[0], min(linear.in_features, linear.out_features)
    if rank > most:
        raise ConfigError(f"init_lora_weights='{method}': r={rank} exceeds the rank of '{path}', which is {most}.")
    return rank


def best_factors(matrix_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, K) and B (N, r), float32, whose product ``B A`` is nearest to the matrix; each holds half of the scale.

    That is the truncated singular value decomposition (Eckart and Young, 1936). The subspace comes from the
    eigenvectors of the smaller Gram matrix, and the decomposition is made anew within it: about five times faster
    than a full one, and as near to the matrix to 1e-6.
    """
    assert rank <= min(matrix_NK.shape)
    wide = matrix_NK.shape[0] <= matrix_NK.shape[1]
    matrix_ML = (matrix_NK if wide else matrix_NK.t()).float()
    leading_Mr = torch.linalg.eigh(matrix_ML @ matrix_ML.t()).eigenvectors[:, -rank:]
    left_rr, values_r, right_rL = torch.linalg.svd(leading_Mr.t() @ matrix_ML, full_matrices=False)
    roots_r = values_r.sqrt()
    left_Mr, right_rL = (leading_Mr @ left_rr) * roots_r, roots_r[:, None] * right_rL
    return (right_rL, left_Mr) if wide else (left_Mr.t(), right_rL.t())


def near_factors(matrix_NK: Tensor, rank: int, rounds: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same by ``rounds`` of subspace iteration from a random start (arXiv:0909.4061): faster, not the nearest."""
    with torch.random.fork_rng(devices=[matrix_NK.device] if matrix_NK.is_cuda else []):
        torch.manual_seed(seed)
        left_Nr, values_r, right_Kr = torch.svd_lowrank(matrix_NK.float(), rank, niter=rounds)
    roots_r = values_r.sqrt()
    return roots_r[:, None] * right_Kr.t(), left_Nr * roots_r
