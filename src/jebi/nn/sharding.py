"""Frozen layers of which every process holds a part, by PyTorch's FSDP2; each is whole while it is computed.

What is divided are the projections' weights: dense ones as they are, of packed ones the codes and 8-bit scales
(`Codes`). The rest of a layer (norms, biases, scales of scales: a thousandth) and its adapter every process has. FSDP2
divides and gathers; when it does is said here, since its own hooks follow modules that are called, and a hand-written
layer is one autograd node that reads its weights twice. While a layer is computed the next one, in the backward the one
before it, is on its way.

All processes must go through the layers in step. Those that share them are the ones of one machine: what crosses a slow
network is the adapter's gradients alone.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from jebi.kernels.dequantize import PackedWeight
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
        weights = [module.weight for module in layer.modules() if isinstance(module, Linear)]
        divided = {weight for weight in weights if isinstance(weight, nn.Parameter)}
        packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
        if packed:
            layer.codes = Codes(packed)
            divided.add(layer.codes.laid)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(layer.parameters()) - divided)
        if packed:
            self.wait()
            layer.codes.show()
            self.part()

    def gather(self) -> None:
        """Send for the others' parts, unless that was done."""
        self._layer.unshard(async_op=True)

    def wait(self) -> None:
        """Return when the layer is whole, to what is launched from now on."""
        self._layer.unshard()

    def part(self) -> None:
        """Keep this process's part alone."""
        self._layer.reshard()


_ALIGNED = 16
"""Bytes at a multiple of which a weight's codes begin: kernels read as many at a time."""


class Codes(nn.Module):
    """The codes of a layer's packed weights, end to end in one parameter, for FSDP2 to divide.

    Parameter: ``laid`` float32, four bytes of codes a number, which is copied and never computed with. FSDP2 before
    torch 2.13 takes no dtype that has no gradients. Nor would 16 bits do: to copy several tensors at once a card takes
    them through float32 and back (`torch._foreach_copy_`), and what is a NaN by its bits comes out as another one.
    """

    laid: nn.Parameter

    def __init__(self, weights: list[PackedWeight]):
        """Take the codes over; the weights have none until `show`."""
        super().__init__()
        named = [(w, name) for w in weights for name, part in w.named_buffers() if not part.is_floating_point()]
        starts = [0, *accumulate(-(-getattr(w, name).nbytes // _ALIGNED) * _ALIGNED for w, name in named)]
        whole = torch.zeros(starts[-1], dtype=torch.uint8, device=getattr(*named[0]).device)
        self._places: list[tuple[PackedWeight, str, int, int, torch.dtype]] = []
        for (weight, name), start in zip(named, starts):
            part: Tensor = getattr(weight, name)
            whole[start : start + part.nbytes] = part.view(torch.uint8)
            self._places.append((weight, name, start, start + part.nbytes, part.dtype))
            delattr(weight, name)  # one by one, so that none is there twice for long
        self.laid = nn.Parameter(whole.view(torch.float32), requires_grad=False)

    def show(self) -> None:
        """Let the weights read what is gathered just now, and with it whatever is gathered later.

        FSDP2 gathers into the same tensor every time: in between its memory is given back from under the views, which
        autograd may hold as well ("FSDP and autograd" in its ``_fsdp_param.py``).
        """
        whole = self.laid.detach().view(torch.uint8)
        for weight, name, start, stop, dtype in self._places:
            setattr(weight, name, whole[start:stop].view(dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codes":
        # A cast would round them, and FSDP2's parts stay on their device.
        return self


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
