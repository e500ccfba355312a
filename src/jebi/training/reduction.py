"""A step's gradients averaged over the processes of a training: one all-reduce of one flat buffer, behind all passes.

Behind the gradients lie two numbers that travel along, so that no process waits for its card to agree with the others:
the step's loss, and whether any process was asked to stop. Which rows a process has is `data.dealing`'s, where the
gradients lie `training.flat`'s.

Shape suffix: T values of the buffer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jebi.config.limits import TRAVELLING
from jebi.errors import ConfigError, RankError
from jebi.nn.host_copy import HostCopy
from jebi.training.flat import FlatGradients

_LOSS, _STOP = range(-TRAVELLING, 0)
"""Places from the buffer's end."""


class Reduction:
    """Averages the gradients of everything trained over all processes."""

    def __init__(self, trained: list[nn.Parameter], values: bool = True):
        """Lay the gradients flat, and start every process from the first one's values.

        Args:
            trained: everything that is trained.
            values: whether to lay them flat too.

        Raises:
            ConfigError: something trained is not float32, or not on the device that the rest is on.
        """
        if any(p.dtype != torch.float32 or p.device != trained[0].device for p in trained):
            raise ConfigError("over several processes everything trained is float32 on one device: load it so.")
        self.gradients = FlatGradients(trained, TRAVELLING, values)
        # A number set by its index would be copied from the host, which waits for all passes: 16 ms a step on an H200.
        self._loss, self._stop = self.gradients.whole_T[_LOSS], self.gradients.whole_T[_STOP]
        self._asked: list[HostCopy] = []
        with torch.no_grad(), explained():
            for parameter in trained:
                dist.broadcast(parameter.data, src=0)

    def run(self, loss: Tensor, stop: bool) -> Tensor:
        """Average what all processes have of a step; the average of ``loss``.

        Args:
            loss: of this process's rows, on the device.
            stop: whether this process was asked to stop.
        """
        whole_T = self.gradients.whole_T
        self._loss.copy_(loss)
        self._stop.fill_(stop)
        with explained():
            dist.all_reduce(whole_T)
        whole_T /= dist.get_world_size()
        self._asked.append(HostCopy((), self._stop.dtype, self._stop.device))
        self._asked[-1].send(self._stop)
        return self._loss.clone()

    def stopping(self) -> bool:
        """Whether any process was asked to stop before the last step, or on a card before the one before it.

        Every process hears the same, a step late on a card: the last step may still be under way there.
        """
        late = 1 if self.gradients.whole_T.is_cuda else 0
        stops = False
        while len(self._asked) > late:
            stops |= self._asked.pop(0).read().item() > 0
        return stops


@contextmanager
def explained() -> Iterator[None]:
    """Within it a connection that breaks is told as what it is.

    Raises:
        RankError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "another process of this training is gone, so this one stops; what happened is in the other's own messages "
            "and in the launcher's. The last checkpoint is whole: start again with --resume "
            f"(resume_from_checkpoint=True), on as many processes as there are now. ({str(error).splitlines()[0]})"
        ) from error
