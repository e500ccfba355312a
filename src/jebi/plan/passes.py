"""How many tokens one pass may have, and what layers keep: the fastest that the memory there is allows.

Bytes are counted by `plan.inventory`. Rows are put into passes by `data.passes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jebi.config import Checkpointing
from jebi.config.limits import CHUNK_TOKENS
from jebi.models.families import DecoderShape
from jebi.plan.activations import AdapterRanks, Pass, PassBytes, host_bytes_per_token, pass_bytes, sent_bytes_per_token
from jebi.plan.held import Held
from jebi.plan.inventory import SLACK_BYTES, fixed_items, kept_weight_bytes, scratch_bytes, total

CPU_PASS_TOKENS = 2048
"""On a CPU longer passes gain nothing: a pass of this many tokens already runs its products at full rate."""
GPU_PASS_TOKENS = 8192
"""On a card passes beyond this gain nothing either (Llama 8B, H100: 4,096 and 8,192 tokens run at the same rate), and
their buffers only grow."""
_SHARE, _SHARE_SHARED = 0.95, 0.8
"""Of the room that is used: on a card for what a prediction may be off; of a host's memory, which others use too."""

_RECOMPUTING = 0.34
_DEQUANTISING, _PASS, _HEAD_ON_HOST = 250, 40, 400
_OFFLOADING = 0.02
_SENDING = 0.12
_LONG_ROW = 131072
"""What things cost, in the time that a token of Llama 8B's takes where all is kept and nothing dequantised:
recomputing all layers; dequantising all weights, for each pass or chunk; a pass itself, of any size; a head that comes
out of host memory, for each pass; layer inputs there; what is saved of it where all layers send gate and up there too;
and recomputing attention's output of a row as long as that. Llama 8B's shape on an H200: 57.6 us with everything kept,
86.5 recomputing in passes of 2,362 tokens, 89.4 with inputs and head in host memory in passes of 3,039; on an H100 gate
and up take 10 us forward, and attention over 65,536 tokens 28. A pass takes 2.4 ms more than its tokens in Llama 8B's
shape and 2.9 in Llama 1B's. In 6 GB 86.0 us with gate and up of 11 layers sent, in passes of two rows of 2,048 tokens,
82.6 without, in passes of three."""
_MEASURED_VALUES = 6_979_321_856
"""Projected values of Llama 8B's shape."""
_MEASURED_HEAD = 525_336_576
"""Values of its head."""
_PASS_ON_CPU = 30
"""A pass itself, there."""
_LONGEST = 2**22
"""Tokens beyond which no row is looked for."""
_CHUNKS = (CHUNK_TOKENS, CHUNK_TOKENS // 2, CHUNK_TOKENS // 4, CHUNK_TOKENS // 8)
"""Sizes of chunks in the order they are tried: a smaller one dequantises 4-bit weights more often."""


@dataclass(frozen=True)
class PassPlan:
    """What a training pass may hold."""

    checkpointing: Checkpointing
    """What layers do with their activations."""
    tokens: int
    """Most tokens of one pass; a longer row is a pass of its own."""
    keep_weights: bool = False
    """Whether 4-bit and 8-bit weights are kept dequantised for all passes, instead of once a use."""
    chunk: int = CHUNK_TOKENS
    """Tokens that layers take at a time, where they recompute."""
    fits: bool = True
    """Whether that holds the longest row; where not, training may run out of memory."""
    kept_layers: int = 0
    """Layers, the last ones, that keep everything whatever the others do."""
    shipped_layers: int = 0
    """Of the others those that send gate and up to host memory beside their input."""
    cost: float = field(default=0.0, compare=False)
    """Time a token takes beyond what it must, relative to one of Llama 8B's; to compare plans by."""

    def made(self, tokens: int, sizes: int = 1) -> Pass:
        """A pass that has so many tokens, for the count of its memory, in a run whose passes have so many sizes."""
        return Pass(
            tokens, self.checkpointing, self.chunk, self.keep_weights, self.kept_layers, self.shipped_layers, sizes
        )


@dataclass(frozen=True)
class Room:
    """Memory that training may take beside the loaded model; bytes."""

    card: int
    """On the device, less what its allocator will keep beside."""
    weights: int = 0
    """What keeping packed weights dequantised would take of it; 0 where none are packed."""
    scratch: int = 0
    """What one group of weights takes that is dequantised at every use."""
    host: int = 0
    """Host memory for activations; 0 where the model is in it too."""
    on_card: bool = True
    """Whether the device is a card."""
    carried: int = 0
    """Bytes of a token that the bus takes to host memory while the token's forward lasts (`time.carried_bytes`)."""
    ranks: AdapterRanks = AdapterRanks()  # noqa: RUF009  (frozen)
    """Of the adapters."""
    crossing: int = 0
    """Values of a head that comes out of host memory for each pass (`places.best`)."""

    @property
    def usable(self) -> int:
        """What a plan may take of the device."""
        return int(self.card * (_SHARE if self.on_card else _SHARE_SHARED))

    @property
    def usable_host(self) -> int:
        """What a plan may take of host memory."""
        return int(self.host * _SHARE_SHARED)


def room_beside(held: Held, free: int, host: int = 0, carried: int = 0) -> Room:
    """The room of a training's passes.

    Args:
        held: the model and its adapter.
        free: bytes on the device beside these and the optimizer.
        host: free bytes of host memory.
        carried: `time.carried_bytes`.
    """
    free -= total(fixed_items(held))
    if not held.on_card:
        return Room(free, scratch=scratch_bytes(held), on_card=False, ranks=held.at_work)
    kept, scratch = kept_weight_bytes(held), scratch_bytes(held)
    return Room(free - SLACK_BYTES, kept, scratch, host, carried=carried, ranks=held.at_work)


def choose(
    shape: DecoderShape,
    element: int,
    room: Room,
    longest_row: int,
    asked: Checkpointing | None,
    limit: int,
    alike: bool = False,
) -> PassPlan:
    """The fastest plan that fits, by the costs above.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        room: the memory there is.
        longest_row: tokens of the longest row.
        asked: what the user named, which is obeyed; None lets the plan choose.
        limit: most tokens worth having in a pass.
        alike: whether all rows are as long as the longest.
    """
    size = _Size(shape, element, longest_row, limit, room, alike)
    budget = room.usable
    modes: list[Checkpointing] = ["none", "keep_attention", "recompute"]
    on_host = host_bytes_per_token(shape, element)
    if asked is None and size.least * on_host <= room.usable_host:
        modes.append("offload")
    found: list[PassPlan] = []
    for mode in modes if asked is None else [asked]:
        for keep in (True, False) if room.weights else (False,):
            left = budget - (room.weights if keep else room.scratch)
            for plan in size.plans(mode, left, keep or not room.weights, asked is None):
                tokens = plan.tokens
                if asked is None and mode == "offload":
                    tokens = min(tokens, room.usable_host // size.on_host(plan.kept_layers, plan.shipped_layers))
                if tokens >= min(size.least, limit):
                    found.append(replace(plan, tokens=tokens, keep_weights=keep and bool(room.weights)))
    if found:
        return min(found, key=lambda plan: plan.cost)
    last, chunk = modes[-1] if asked is None else asked, _CHUNKS[-1]
    tokens = size.most(last, budget - room.scratch, chunk, 0)
    return PassPlan(last, max(1, min(tokens, limit)), chunk=chunk, fits=False, cost=float("inf"))


@dataclass(frozen=True)
class _Size:
    """A decoder and its rows."""

    shape: DecoderShape
    element: int
    longest_row: int
    limit: int
    room: Room
    alike: bool = False

    @property
    def least(self) -> int:
        """Fewest tokens of a pass: the longest row, or what products need to run at their rate."""
        return max(self.longest_row, self.limit // 8)

    def plans(self, mode: Checkpointing, room: int, dense: bool, free: bool) -> Iterator[PassPlan]:
        """What fits into a room; ``dense`` says that nothing is dequantised, ``free`` that some layers may keep all."""
        for chunk in _CHUNKS[:1] if mode == "none" else _CHUNKS:
            reach = self.most(mode, room, chunk, 0)
            if reach >= self.least:
                # Small chunks are for rows that would not fit, not for more rows in a pass.
                tokens = min(reach if chunk == _CHUNKS[0] else self.least, self.limit)
                yield PassPlan(mode, tokens, chunk=chunk, cost=self._cost(mode, tokens, chunk, 0, dense))
        for kept in range(len(self.shape.layers)) if free and mode != "none" else ():
            for sent in (0, self._sent(kept)) if mode == "offload" else (0,):
                reach = self.most(mode, room, _CHUNKS[0], kept, sent)
                if reach < self.least:
                    break
                tokens = min(reach, self.limit)
                cost = self._cost(mode, tokens, _CHUNKS[0], kept, dense, sent)
                yield PassPlan(mode, tokens, kept_layers=kept, shipped_layers=sent, cost=cost)
            else:
                continue
            break

    def on_host(self, kept: int, sent: int) -> int:
        """Bytes of a token in host memory."""
        return self._bytes(Pass(1, "offload", _CHUNKS[0], kept_layers=kept, shipped_layers=sent)).host

    def _sent(self, kept: int) -> int:
        """Layers whose gate and up the bus takes along unnoticed, evenly spread; none of rows in several chunks."""
        left = self.room.carried - self.on_host(kept, 0)
        # A head that crosses too leaves the bus no time: Llama 8B's shape in 6 GB is 9 % faster without.
        if left <= 0 or self.room.crossing or self.longest_row > _CHUNKS[0]:
            return 0
        # One after the other would be two at a time.
        return min(left // sent_bytes_per_token(self.shape, self.element), (len(self.shape.layers) - kept) // 2)

    def most(self, mode: Checkpointing, room: int, chunk: int, kept: int, sent: int = 0) -> int:
        """Most tokens that fit, up to what is worth it or must be.

        Args:
            mode: what layers keep.
            room: bytes there are.
            chunk: tokens of a chunk.
            kept: layers that keep everything.
            sent: layers that send gate and up to host memory.
        """

        def fits(tokens: int) -> bool:
            return self._bytes(Pass(tokens, mode, chunk, kept_layers=kept, shipped_layers=sent)).device <= room

        low, high = 0, max(self.limit, self.least)
        if fits(high):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _bytes(self, made: Pass) -> PassBytes:
        return pass_bytes(self.shape, self.element, made, self.room.on_card, self.room.ranks)

    @property
    def _share(self) -> float:
        """What a token takes of the time it takes in Llama 8B's shape; a pass costs the same time whatever the size."""
        return self.shape.projected / _MEASURED_VALUES

    def _filled(self, tokens: int) -> int:
        """Of the tokens that a pass may have, those that whole rows fill, where all are of one length."""
        whole = tokens // self.longest_row * self.longest_row
        return whole if self.alike and whole else tokens

    def _cost(self, mode: Checkpointing, tokens: int, chunk: int, kept: int, dense: bool, sent: int = 0) -> float:
        share, of_a_pass = (self._share, _PASS) if self.room.on_card else (1.0, _PASS_ON_CPU)
        of_head = _HEAD_ON_HOST * self.room.crossing / _MEASURED_HEAD
        tokens = self._filled(tokens) if self.room.on_card else tokens
        return (of_a_pass + of_head) / tokens + share * self._beyond(mode, tokens, chunk, kept, dense, sent)

    def _beyond(self, mode: Checkpointing, tokens: int, chunk: int, kept: int, dense: bool, sent: int) -> float:
        """What a token takes beyond its share of a pass and what it must, relative to the latter."""
        cost = 0.0
        if not dense:
            cost += _DEQUANTISING / (tokens if mode == "none" else min(tokens, chunk))
        if mode != "none":
            attention = self.longest_row / _LONG_ROW if mode == "recompute" else 0
            again = _RECOMPUTING + attention + (_OFFLOADING if mode == "offload" else 0)
            cost += again * (1 - kept / len(self.shape.layers)) - _SENDING * sent / len(self.shape.layers)
        return cost


def longest_row(shape: DecoderShape, element: int, room: Room, asked: Checkpointing | None) -> int:
    """Tokens of the longest row that a room holds, by the plan that takes the least; 0 where there is none."""
    budget = room.usable - room.scratch
    modes: list[Checkpointing] = ["none", "keep_attention", "recompute", "offload"] if asked is None else [asked]
    found = []
    for mode in modes:
        most = _Size(shape, element, 1, _LONGEST, room).most(mode, budget, _CHUNKS[-1], 0)
        if mode == "offload" and room.on_card:
            most = min(most, room.usable_host // host_bytes_per_token(shape, element))
        found.append(most)
    return max(found)
