"""A product whose result is float32 whatever the factors are: gradients of what is trained are sums over many tokens.

Shapes: M, K, N as of any two matrices.
"""

import torch
from torch import Tensor


def product32(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """``a b`` (M, N) in float32, from factors of one dtype.

    On a card the sums are never rounded to the factors' dtype. On a CPU those of bfloat16 are (its products know no
    other result); those of float16 are not, since they may be beyond 65,504.
    """
    if a_MK.is_cuda and a_MK.dtype != torch.float32:
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    if a_MK.dtype == torch.float16:
        a_MK, b_KN = a_MK.float(), b_KN.float()
    return (a_MK @ b_KN).float()
