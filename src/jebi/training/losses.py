"""The losses of steps, looked at only when the host waits for the card anyway, so that no step waits for it."""

import math

import torch
from torch import Tensor

from jebi.errors import DivergedError


class Losses:
    """Losses since the last look, still on the device."""

    def __init__(self) -> None:
        self._unseen: list[tuple[int, Tensor, list[int]]] = []

    def add(self, step: int, loss: Tensor, rows: list[int]) -> None:
        """A step's loss, and the numbers of its rows."""
        self._unseen.append((step, loss, rows))

    def require_finite(self, output_dir: str | None) -> None:
        """Look at them.

        Raises:
            DivergedError: one is NaN or infinite; ``output_dir`` is where checkpoints are.
        """
        steps, self._unseen = self._unseen, []
        values = torch.stack([loss for _, loss, _ in steps]).tolist() if steps else []
        for (step, _, rows), value in zip(steps, values):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} at step {step}, rows {rows}. Stopped; checkpoints saved before under "
                    f"'{output_dir}' stay. Look at those rows, or lower learning_rate."
                )
