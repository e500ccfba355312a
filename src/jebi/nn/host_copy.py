"""A few numbers on their way from a device to the host, which waits for them only where it reads them.

What a training or an answer tells the host of each step: whether to stop, which token was taken. Activations that go
to host memory and come back are `host_memory`'s.
"""

import torch
from torch import Tensor


class HostCopy:
    """A place on the host for values of one shape and dtype; on a card the copy travels behind what is under way."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        """Without values yet.

        Args:
            shape: of the values.
            dtype: likewise.
            device: where they come from.
        """
        on_card = device.type == "cuda"
        self._values = torch.empty(shape, dtype=dtype, pin_memory=on_card)
        self._copied = torch.cuda.Event() if on_card else None

    def send(self, values: Tensor) -> None:
        """Start the copy; what was sent before is overwritten."""
        self._values.copy_(values, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self) -> Tensor:
        """The values, a tensor of their own; waits for the copy alone, not for what was launched behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.clone()
