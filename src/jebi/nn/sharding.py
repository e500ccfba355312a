"""Frozen layers of which every process holds a part, by PyTorch's FSDP2; each is whole while it is computed.

What is divided are the projections' weights, dense ones or the codes and 8-bit scales of packed ones; the rest of a
layer (norms, biases, scales of scales: a thousandth) and its adapter every process has. FSDP2 divides and gathers; when
it does is said here, since its own hooks follow modules that are called, and a hand-written layer is one autograd node
that reads its weights twice. While a layer is computed the next one, in the backward the one before it, is on its way.

All processes must go through the layers in step. Those that share them are the ones of one machine: what crosses a slow
network is the adapter's gradients alone.
"""

from itertools import pairwise
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from jebi.nn.linear import Linear


class Shard:
    """A layer's part here, and the way to the whole of it."""

    def __init__(self, layer: Any, mesh: DeviceMesh):
        """Divide a layer of which this process has the whole, as every other one has; it keeps its part.

        Args:
            layer: its weights frozen, on this process's device.
            mesh: the processes that share it.
        """
        from torch.distributed.fsdp import fully_shard

        self._layer = layer
        self.before: Shard | None = None
        """The layer that comes before it."""
        self.behind: Shard | None = None
        """The layer that comes next."""
        linears = [module for module in layer.modules() if isinstance(module, Linear)]
        divided = {id(part) for linear in linears for part in divisible(linear)}
        others = {parameter for parameter in layer.parameters() if id(parameter) not in divided}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)

    def gather(self) -> None:
        """Send for the others' parts, unless that was done."""
        self._layer.unshard(async_op=True)

    def wait(self) -> None:
        """Return when the layer is whole, to what is launched from now on."""
        self._layer.unshard()

    def part(self) -> None:
        """Keep this process's part alone."""
        self._layer.reshard()


def divisible(linear: Linear) -> list[nn.Parameter]:
    """What of a map's weight is divided; FSDP2 divides parameters, so codes become such here."""
    weight = linear.weight
    if isinstance(weight, nn.Parameter):
        return [weight]
    for name, buffer in list(weight.named_buffers()):
        if not buffer.is_floating_point():
            delattr(weight, name)
            weight.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return list(weight.parameters())


def link(shards: list[Shard]) -> None:
    """Tell the layers in which order they come."""
    for one, two in pairwise(shards):
        one.behind, two.before = two, one


def enter(shard: Shard | None, backward: bool = False) -> None:
    """Return when the layer is whole, and send for the next one: in the ``backward`` the one before it.

    Nothing happens for a layer that always is: ``shard`` is None.
    """
    if shard is None:
        return
    shard.wait()
    following = shard.before if backward else shard.behind
    if following is not None:
        following.gather()


def leave(shard: Shard | None, backward: bool = False, again: bool = False) -> None:
    """Keep a part of the layer alone; not of the last one where its backward follows (``again``), which it begins."""
    if shard is not None and (backward or not again or shard.behind is not None):
        shard.part()
