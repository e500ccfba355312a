"""What a training in float16 needs of torch beside a scaled loss, which is accelerate's `GradScaler`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_sums(dtype: torch.dtype) -> Iterator[None]:
    """Within it products in float16 add up in float32 to the end, where ``dtype`` is that.

    Left to itself cuBLAS may split a sum and add the parts in float16, where scaled gradients overflow although their
    sum does not. Passes that are captured within it keep that. Nothing else is changed, and nothing stays so.
    """
    matmul = torch.backends.cuda.matmul
    if dtype != torch.float16:
        yield
        return
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before
