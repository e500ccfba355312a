"""Trained matrices laid end to end in one buffer, and their gradients in another.

An optimizer then updates them in place, in one launch, instead of copying hundreds of little matrices together first
(`training.optimizer`), and captured passes find gradients where they left them (`training.graphs`). Every matrix starts
a block of the optimizer's, so that the buffer is laid out as its moments are.

Shapes: T values, padding included.
"""

import torch
from torch import Tensor, nn

from jebi.kernels.adamw8bit import BLOCK


def padded(tensor: Tensor) -> int:
    """Values that a tensor takes in whole blocks."""
    return -(-tensor.numel() // BLOCK) * BLOCK


def starts_of(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Where each begins, and the values in all."""
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += padded(tensor)
    return starts, size


def lay_flat(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Move float32 parameters of one device into one buffer; a zeroed buffer for gradients (T), and its parts."""
    starts, size = starts_of([p.data for p in parameters])
    if stretch_of([p.data for p in parameters], starts, size) is None:
        values_T = torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
        for parameter, start in zip(parameters, starts):
            place = _part(values_T, parameter, start)
            parameter.data = place.copy_(parameter.data)
    grads_T = torch.zeros(size, dtype=torch.float32, device=parameters[0].device)
    return grads_T, [_part(grads_T, parameter, start) for parameter, start in zip(parameters, starts)]


def stretch_of(tensors: list[Tensor], starts: list[int], size: int) -> Tensor | None:
    """The stretch of memory (T) in which float32 tensors already lie from these starts on; None where they do not."""
    first = tensors[0]
    storage = first.untyped_storage()
    behind = storage.nbytes() - 4 * first.storage_offset()
    for tensor, start in zip(tensors, starts):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return None
        if tensor.untyped_storage().data_ptr() != storage.data_ptr():
            return None
        if tensor.storage_offset() - first.storage_offset() != start:
            return None
    return first.detach().as_strided((size,), (1,)) if behind >= 4 * size else None


def _part(flat_T: Tensor, like: Tensor, start: int) -> Tensor:
    return flat_T[start : start + like.numel()].view(like.shape)
