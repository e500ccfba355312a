"""The linear maps of one input (q, k and v; gate and up; o; down), as a hand-written layer calls them.

Two forms. `Separate` is one map after the other and serves everything a `Linear` can be. `Stacked` is for a card: the
weights lie below each other in one matrix and the adapters' too, so that a group costs one large product and a few thin
ones; how the weights are held and multiplied is `base_product`'s.

Shapes: T tokens, K inputs, N outputs of all maps, R ranks of all adapters.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from jebi.kernels.dequantize import PackedWeight
from jebi.kernels.glu import carries
from jebi.kernels.low_rank import LowRank, product32
from jebi.kernels.rope import adjacent
from jebi.nn.base_product import BaseProduct, spans
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Grads, Linear, Share, backward_input, backward_trained, project
from jebi.nn.lora import Lora


class Group(Protocol):
    """Maps of one input; outputs and their gradients are lists with one tensor a part (see `layer.parts`)."""

    def forward(
        self, x_TK: Tensor, residual_TN: Tensor | None = None, whole: bool = True
    ) -> tuple[list[Tensor], "Kept"]:
        """Outputs, ``residual_TN`` added to the only one where given, and what the backward needs beside the input.

        Without ``whole`` the adapters' share may be left out; `thin` then says what is to be added.
        """
        ...

    def thin(self, kept: "Kept", sizes: list[int]) -> list[LowRank | None]:
        """What is still to be added to each part, of these sizes, after a forward without ``whole``."""
        ...

    def backward_input(
        self, dparts: list[Tensor], wanted: bool = True, whole: bool = True
    ) -> tuple[Tensor | None, "Shares"]:
        """Gradient of the input, which itself is not needed; None where it is not ``wanted``.

        Without ``whole`` the adapters' share may be left out; ``Shares.thin`` is then to be added.
        """
        ...

    def backward_trained(
        self, shares: "Shares", x_TK: Tensor | None, kept: "Kept | None", grads: Grads, sums: "Sums | None" = None
    ) -> None:
        """Gradients of everything trained into ``grads``.

        ``kept`` is made again where it is None; ``x_TK`` may be None where neither that nor ``sums`` asks for it.
        """
        ...


@dataclass
class Kept:
    """What a group's forward keeps for its backward."""

    xa: list[Tensor | None]
    """Each map's ``x A^T``, or that of all of them at once."""


@dataclass
class Shares:
    """What a group's first half of the backward leaves for the second."""

    dy: list[Tensor]
    """Gradients of the outputs, one tensor a map, or one for all."""
    maps: list[Share]
    """Each map's share; none where one product makes them all."""
    thin: LowRank | None = None
    """What is still to be added to the gradient of the input."""
    dxa_TR: Tensor | None = None
    """Gradient of all maps' ``x A^T`` where it is one product."""


@dataclass(frozen=True)
class Sums:
    """Gradients of adapters that another kernel has made in passing."""

    down_RK: Tensor | None = None
    """Of all maps' A."""
    up: tuple[Tensor | None, ...] = ()
    """Of each part's ``scale * B``, transposed (r, N), the frozen half included."""


class Separate:
    """One map after the other."""

    def __init__(self, maps: list[Linear]):
        self.maps = maps

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None, whole: bool = True) -> tuple[list[Tensor], Kept]:
        """See `Group`."""
        outputs, kept = [], Kept([])
        for linear in self.maps:
            y_TN, xa_TR = project(linear, x_TK)
            outputs.append(y_TN)
            kept.xa.append(xa_TR)
        if residual_TN is not None:
            outputs[0].add_(residual_TN)
        return outputs, kept

    def thin(self, kept: Kept, sizes: list[int]) -> list[LowRank | None]:
        """See `Group`."""
        return [None] * len(sizes)

    def backward_input(
        self, dparts: list[Tensor], wanted: bool = True, whole: bool = True
    ) -> tuple[Tensor | None, Shares]:
        """See `Group`."""
        dy = dparts if len(dparts) == len(self.maps) else [joined(dparts)]
        dx_TK, shares = None, []
        for linear, dy_TN in zip(self.maps, dy):
            dx_TK, share = backward_input(linear, dy_TN, dx_TK, wanted)
            shares.append(share)
        return dx_TK, Shares(dy, shares)

    def backward_trained(
        self, shares: Shares, x_TK: Tensor | None, kept: Kept | None, grads: Grads, sums: Sums | None = None
    ) -> None:
        """See `Group`."""
        assert x_TK is not None, "no thin share of these maps went anywhere else"
        for number, (linear, dy_TN, share) in enumerate(zip(self.maps, shares.dy, shares.maps)):
            if kept is not None:
                xa_TR = kept.xa[number]
            else:
                xa_TR = linear.adapter.compress(x_TK) if linear.adapter is not None else None
            backward_trained(linear, dy_TN, share, x_TK, xa_TR, grads)


def stacks(maps: list[Linear], answering: bool = False) -> bool:
    """Whether `Stacked` serves these maps: frozen weights, and adapters that are low-rank products and no more.

    Dropout does not count where the maps are only to answer.
    """
    for linear in maps:
        if isinstance(linear.weight, nn.Parameter) and linear.weight.requires_grad:
            return False
        for lora in (linear.lora, linear.lora and linear.lora.stand_in):
            if lora is not None and (lora.magnitude_N is not None or (lora.dropout > 0 and not answering)):
                return False
    return True


class Stacked:
    """All maps of one input as one matrix."""

    def __init__(self, maps: list[Linear], base: BaseProduct, apart: bool = True):
        """Lay the adapters below each other.

        Args:
            maps: of one input; `stacks` says whether they can be.
            base: their weights as one.
            apart: whether `thin` may be asked for the adapters' shares; otherwise they are added at once, all maps' in
                one product, which is less where no kernel takes them along.
        """
        self.maps = maps
        self._apart = apart
        self._spans = spans(maps)
        self.base = base
        self._outputs = self._spans[-1][2]
        self.columns = maps[0].in_features
        self.dtype = maps[0].dtype
        self._state: list[object] = []
        self._adapters: list[Lora | None] | None = None
        """Those that the casts are arranged for."""
        self._rooms: dict[int, tuple[Tensor, Tensor]] = {}
        """Room for the casts by their rank; it stays, since captured graphs read it."""
        self._down_RK: Tensor | None = None
        self._up_NR: Tensor | None = None
        self._columns: list[slice | None] = []
        """Of each map's adapter, where it has one, the rows in A and columns in B of all adapters."""
        self._thin = True
        """Whether their shares may be left out for the kernel behind to add."""

    def forward(self, x_TK: Tensor, residual_TN: Tensor | None = None, whole: bool = True) -> tuple[list[Tensor], Kept]:
        """See `Group`."""
        self.refresh()
        y_TN = self.base.forward(x_TK, residual_TN)
        for linear, start, end in self._spans:
            if linear.bias is not None:
                y_TN[:, start:end] += linear.bias.to(y_TN.dtype)
        xa_TR = self._compress(x_TK)
        if (whole or not self._thin) and xa_TR is not None and self._up_NR is not None:
            y_TN.addmm_(xa_TR, self._up_NR.t())
        return [y_TN], Kept([xa_TR])

    def thin(self, kept: Kept, sizes: list[int]) -> list[LowRank | None]:
        """See `Group`."""
        xa_TR, up_NR = kept.xa[0], self._up_NR
        if xa_TR is None or up_NR is None or not self._thin:
            return [None] * len(sizes)
        if len(sizes) != len(self.maps):
            return [LowRank(xa_TR, up_nR.t()) for up_nR in up_NR.split(sizes)]
        shares: list[LowRank | None] = [None] * len(sizes)
        for number, ((_, start, end), columns) in enumerate(zip(self._spans, self._columns)):
            if columns is not None:
                shares[number] = LowRank(xa_TR[:, columns], up_NR[start:end, columns].t())
        return shares

    def backward_input(
        self, dparts: list[Tensor], wanted: bool = True, whole: bool = True
    ) -> tuple[Tensor | None, Shares]:
        """See `Group`."""
        dy_TN = joined(dparts)
        dxa_TR = dy_TN @ self._up_NR if self._up_NR is not None else None
        dx_TK = self.base.backward(dy_TN) if wanted else None
        thin = None
        if dx_TK is not None and dxa_TR is not None and self._down_RK is not None:
            if whole or not self._thin:
                dx_TK.addmm_(dxa_TR, self._down_RK)
            else:
                thin = LowRank(dxa_TR, self._down_RK)
        return dx_TK, Shares([dy_TN], [], thin, dxa_TR)

    def backward_trained(
        self, shares: Shares, x_TK: Tensor | None, kept: Kept | None, grads: Grads, sums: Sums | None = None
    ) -> None:
        """See `Group`."""
        dy_TN, dxa_TR = shares.dy[0], shares.dxa_TR
        for linear, start, end in self._spans:
            if linear.bias is not None and linear.bias.requires_grad:
                grads[linear.bias] = dy_TN[:, start:end].sum(0, dtype=torch.float32)
        if dxa_TR is None:
            return
        sums = sums or Sums()
        ddown_RK = sums.down_RK
        if ddown_RK is None:
            assert x_TK is not None
            ddown_RK = product32(dxa_TR.t(), x_TK)
        ups = self._up_grads(dy_TN, x_TK, kept, sums)
        for linear, columns, dup_Nr in zip(self.maps, self._columns, ups):
            if linear.adapter is not None and columns is not None:
                # Of a frozen half the columns lie behind the trained ones.
                rank = linear.adapter.A_rK.shape[0]
                grads[linear.adapter.A_rK] = ddown_RK[columns][:rank]
                dB_Nr, scale = dup_Nr[:, :rank], linear.adapter.scale
                grads[linear.adapter.B_Nr] = dB_Nr if scale == 1 else dB_Nr * scale

    def _up_grads(self, dy_TN: Tensor, x_TK: Tensor | None, kept: Kept | None, sums: Sums) -> list[Tensor]:
        """Gradients of each map's ``scale * B`` (N, r)."""
        if any(made is not None for made in sums.up):
            ups = [made.t() if made is not None else dy_TN[:0] for made in sums.up]
            return ups if len(ups) == len(self.maps) else [torch.cat(ups)]
        if kept is not None:
            xa_TR = kept.xa[0]
        else:
            assert x_TK is not None
            xa_TR = self._compress(x_TK)
        assert xa_TR is not None
        dup_NR = product32(dy_TN.t(), xa_TR)
        places = zip(self._spans, self._columns)
        return [dup_NR[start:end, slice(0) if columns is None else columns] for (_, start, end), columns in places]

    def refresh(self) -> None:
        """Cast the adapters' matrices anew where they have changed since."""
        if self._now() != self._state:
            self.note()
            self.cast()

    def note(self) -> None:
        """Take what is cast for what the matrices are now."""
        self._arrange()
        self._state = self._now()

    def _now(self) -> list[object]:
        # Beside the version the place: a matrix that is exchanged (``p.data = ...``) keeps its version.
        adapters = (linear.adapter for linear in self.maps)
        return [(a, a.scale, *map(_told_apart, (a.A_rK, a.B_Nr))) if a is not None else None for a in adapters]

    def _arrange(self) -> None:
        """Find which maps have adapters, and make room for these."""
        adapters = [linear.adapter for linear in self.maps]
        if adapters == self._adapters:
            return
        self._adapters, self._columns, rank = adapters, [], 0
        for lora in adapters:
            self._columns.append(slice(rank, rank + lora.rank) if lora is not None else None)
            rank += lora.rank if lora is not None else 0
        ranks = [lora.rank for lora in adapters if lora is not None]
        self._thin = self._apart and all(carries(one, self.dtype, self.maps[0].device()) for one in ranks)
        if rank and rank not in self._rooms:
            device = self.maps[0].device()
            down_RK = torch.empty(rank, self.columns, dtype=self.dtype, device=device)
            self._rooms[rank] = down_RK, torch.empty(self._outputs, rank, dtype=self.dtype, device=device)
        self._down_RK, self._up_NR = self._rooms.get(rank, (None, None))
        if self._up_NR is not None:
            self._up_NR.zero_()  # beside each map's own part

    def casts(self) -> tuple[Tensor, Tensor] | None:
        """A (R, K) and ``scale * B`` (N, R) of all adapters that are on, cast; they stay where they are."""
        return None if self._down_RK is None or self._up_NR is None else (self._down_RK, self._up_NR)

    def stored(self) -> list[Tensor | PackedWeight]:
        """The maps' weights as they are held, below each other; one where they are one matrix."""
        whole_NK = self.base.kept()
        if whole_NK is not None:
            return [whole_NK]
        weights = [linear.weight for linear in self.maps]
        return [weight for weight in weights if not isinstance(weight, HostWeight)]

    def lend(self) -> None:
        """Let each map use its part of the matrix by itself too, where one is kept."""
        weight_NK = self.base.kept()
        if weight_NK is not None:
            for linear, start, end in self._spans:
                linear.keep(weight_NK[start:end])

    @torch.no_grad()
    def cast(self) -> None:
        """Cast the adapters' matrices, whether or not they have changed."""
        for (linear, start, end), columns in zip(self._spans, self._columns):
            if linear.adapter is not None and columns is not None:
                assert self._down_RK is not None
                assert self._up_NR is not None
                linear.adapter.cast_into(self._down_RK[columns], self._up_NR[start:end, columns])

    def _compress(self, x_TK: Tensor) -> Tensor | None:
        return x_TK @ self._down_RK.t() if self._down_RK is not None else None


def _told_apart(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x._version


def joined(dparts: list[Tensor]) -> Tensor:
    """The parts side by side: the matrix whose columns they are, or a new one."""
    whole = adjacent(dparts)
    if whole is not None:
        return whole
    return torch.cat(dparts, dim=1) if len(dparts) > 1 else dparts[0]
