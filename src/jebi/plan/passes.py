"""How many tokens one pass may have, and what layers keep: the fastest that the memory there is allows.

The count of bytes follows what `nn.layer_node` keeps and needs at a time. Rows are put into passes by `data.passes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jebi.kernels.linear_cross_entropy import CHUNK_BYTES
from jebi.models.decoder import Checkpointing
from jebi.models.families import DecoderShape
from jebi.nn.attention_pair import TOKEN_HEADS
from jebi.nn.layer_node import CHUNK_TOKENS

CPU_PASS_TOKENS = 2048
"""On a CPU longer passes gain nothing: a pass of this many tokens already runs its products at full rate."""
GPU_PASS_TOKENS = 8192
"""On a card passes beyond this gain nothing either (Llama 8B, H100: 4,096 and 8,192 tokens run at the same rate), and
their buffers only grow."""
TRAINED_BYTES = 12
"""What a trained number takes in training beside itself: its gradient and two moments in float32."""
_SHARE = 0.8
"""Of the free memory; the rest is for the allocator's slack."""


_RECOMPUTING = 0.3
_DEQUANTISING, _PASS, _HEAD_ON_HOST = 250, 30, 400
_OFFLOADING = 0.1
_LONG_ROW = 131072
"""What things cost, in the time that a token takes of which everything is kept and nothing dequantised: recomputing all
layers; dequantising all weights, for each pass or chunk; a pass itself; a head that comes out of host memory, for each
pass; layer inputs there; and recomputing attention's output of a row as long as that. Llama 8B's shape on an H100:
16,500 tokens/s with everything kept, 12,200 recomputing; attention's forward over 65,536 tokens 28 us a token, all else
57."""
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
    cost: float = field(default=0.0, compare=False)
    """Time a token takes beyond what it must, relative to that; to compare plans by."""


@dataclass(frozen=True)
class Room:
    """Memory that training may take beside the loaded model; bytes."""

    card: int
    """On the device."""
    weights: int = 0
    """What keeping packed weights dequantised would take of it; 0 where none are packed."""
    scratch: int = 0
    """What one group of weights takes that is dequantised at every use."""
    host: int = 0
    """Host memory for activations; 0 where the model is in it too."""


def kept_bytes_per_token(shape: DecoderShape, element: int, checkpointing: Checkpointing) -> int:
    """Bytes of activations that one token leaves behind in all layers until its backward.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        checkpointing: what layers keep; ``offload`` leaves nothing on the card.
    """
    layer = shape.layer
    if checkpointing == "offload":
        return 0
    if checkpointing == "recompute":
        return len(shape.layers) * layer.width * element
    if checkpointing == "keep_attention":
        return host_bytes_per_token(shape, element)
    attention = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    # Norms within the blocks keep their inputs.
    if layer.qk_norm:
        attention += (layer.heads + layer.kv_heads) * layer.head_dim
    normed = 2 * layer.width if layer.sandwich else 0
    # Of the norms and of attention.
    statistics = 4 * (2 + layer.heads)
    return len(shape.layers) * ((normed + 2 * layer.width + attention + 2 * layer.ffn) * element + statistics)


def host_bytes_per_token(shape: DecoderShape, element: int) -> int:
    """Bytes that one token has in host memory under ``offload``: each layer's input, attention's output, its sums."""
    layer = shape.layer
    return len(shape.layers) * ((layer.width + layer.heads * layer.head_dim) * element + 4 * layer.heads)


def work_bytes(shape: DecoderShape, element: int, checkpointing: Checkpointing, tokens: int, chunk: int) -> int:
    """Bytes of a pass, beside what layers keep, while a layer's backward is under way.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        checkpointing: what layers keep.
        tokens: of the pass.
        chunk: tokens that layers take at a time, where they recompute.
    """
    layer = shape.layer
    inner, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    # The stream's gradient, and that of attention's output.
    whole = layer.width + inner
    if checkpointing != "none":
        # Queries, keys and values, which become their gradients, and attention's output.
        whole += 2 * inner + 2 * keys + (inner + keys if layer.qk_norm else 0)
    if checkpointing == "keep_attention":
        whole -= inner
    if checkpointing == "offload":
        # The layer's input, and what comes for the next layer.
        whole += 2 * layer.width + inner
    # Of the heads that attention's backward takes at a time: copies, gradients, and the backend's own, partly float32.
    share = layer.heads // layer.kv_heads
    token_heads = min(tokens * layer.heads, max(tokens * share, TOKEN_HEADS))
    attention = token_heads * layer.head_dim * (6 * element + 4)
    # Gate, up, the gradient of their product and room for another; the norm's input, output and their gradients.
    of_chunk = (4 * layer.ffn + 6 * layer.width) * element
    at_once = tokens if checkpointing == "none" else min(tokens, chunk)
    return tokens * whole * element + attention + at_once * of_chunk


def choose(
    shape: DecoderShape, element: int, room: Room, longest_row: int, asked: Checkpointing | None, limit: int
) -> PassPlan:
    """The fastest plan that fits, by the costs above.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        room: the memory there is.
        longest_row: tokens of the longest row.
        asked: what the user named, which is obeyed; None lets the plan choose.
        limit: most tokens worth having in a pass.
    """
    size = _Size(shape, element, longest_row, limit)
    budget = int(room.card * _SHARE) - 2 * CHUNK_BYTES
    modes: list[Checkpointing] = ["none", "keep_attention", "recompute"]
    on_host = host_bytes_per_token(shape, element)
    if asked is None and size.least * on_host <= room.host * _SHARE:
        modes.append("offload")
    found: list[PassPlan] = []
    for mode in modes if asked is None else [asked]:
        for keep in (True, False) if room.weights else (False,):
            left = budget - (room.weights if keep else room.scratch)
            for plan in size.plans(mode, left, keep or not room.weights, asked is None):
                tokens = plan.tokens
                if asked is None and mode == "offload":
                    tokens = min(tokens, int(room.host * _SHARE) // on_host)
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
        for kept in range(1, len(self.shape.layers)) if free and mode != "none" else ():
            reach = self.most(mode, room, _CHUNKS[0], kept)
            if reach < self.least:
                break
            tokens = min(reach, self.limit)
            cost = self._cost(mode, tokens, _CHUNKS[0], kept, dense)
            yield PassPlan(mode, tokens, kept_layers=kept, cost=cost)

    def most(self, mode: Checkpointing, room: int, chunk: int, kept: int) -> int:
        """Most tokens that fit, up to what is worth it or must be, where so many layers keep everything."""
        layers = len(self.shape.layers)
        each = kept_bytes_per_token(self.shape, self.element, mode) * (layers - kept)
        each = (each + kept_bytes_per_token(self.shape, self.element, "none") * kept) // layers
        low, high = 0, max(self.limit, self.least)
        while low < high:
            middle = (low + high + 1) // 2
            work = work_bytes(self.shape, self.element, mode, middle, chunk)
            if kept:
                work = max(work, work_bytes(self.shape, self.element, "none", middle, chunk))
            low, high = (middle, high) if middle * each + work <= room else (low, middle - 1)
        return low

    def _cost(self, mode: Checkpointing, tokens: int, chunk: int, kept: int, dense: bool) -> float:
        cost = _PASS / tokens
        if not dense:
            cost += _DEQUANTISING / (tokens if mode == "none" else min(tokens, chunk))
        if mode != "none":
            attention = self.longest_row / _LONG_ROW if mode == "recompute" else 0
            again = _RECOMPUTING + attention + (_OFFLOADING if mode == "offload" else 0)
            cost += again * (1 - kept / len(self.shape.layers))
        return cost


def head_cost(tokens: int) -> float:
    """What a head in host memory adds to a plan's cost, for passes of so many tokens."""
    return _HEAD_ON_HOST / tokens
