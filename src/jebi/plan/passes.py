"""How many tokens one pass may have, and whether layers keep their activations, from the memory there is.

The count of bytes follows what `nn.layer_node` keeps and needs at a time. Rows are put into passes by `data.passes`.
"""

from dataclasses import dataclass

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


_LONG_ROW = 16384
"""Tokens of a row from which attention's output is worth twice the memory of recomputing it."""
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
    statistics = 4 * layer.heads
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
    shape: DecoderShape,
    element: int,
    free_bytes: int,
    longest_row: int,
    asked: Checkpointing | None,
    limit: int,
    weights: int = 0,
    host_bytes: int = 0,
) -> PassPlan:
    """The fastest plan that fits: keep everything if passes then still hold the longest row, else recompute.

    Of long rows attention's output is kept before it is recomputed too: at 65,536 tokens of Llama 3.1 8B attention's
    forward is a seventh of a step, at 4,096 a fiftieth.

    Weights are kept dequantised where that leaves room for everything else: a pass of 4,096 tokens spends a twentieth
    of its time on dequantising them, recomputing a fifth. Host memory is used last, where a card cannot hold the
    longest row's layer inputs.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        free_bytes: memory that training may take beside the loaded model.
        longest_row: tokens of the longest row.
        asked: what the user named, which is obeyed; None lets the plan choose.
        limit: most tokens worth having in a pass.
        weights: bytes that keeping packed weights dequantised would take.
        host_bytes: host memory that activations may take; 0 where the model is in it too.
    """
    budget = int(free_bytes * _SHARE) - 2 * CHUNK_BYTES
    least = max(longest_row, limit // 8)
    modes: list[Checkpointing] = ["none", "keep_attention", "recompute"]
    if asked is not None:
        modes = [asked]
    elif longest_row < _LONG_ROW:
        modes.remove("keep_attention")
    on_host = host_bytes_per_token(shape, element)
    if asked is None and least * on_host <= host_bytes * _SHARE:
        modes.append("offload")

    def most(mode: Checkpointing, room: int, chunk: int) -> int:
        """Most tokens that fit, up to what is worth it or must be."""
        kept = kept_bytes_per_token(shape, element, mode)
        low, high = 0, max(limit, least)
        while low < high:
            middle = (low + high + 1) // 2
            fits = middle * kept + work_bytes(shape, element, mode, middle, chunk) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    for mode in modes:
        for keep in (True, False) if weights else (False,):
            for chunk in _CHUNKS[:1] if mode == "none" or keep else _CHUNKS:
                tokens = most(mode, budget - (weights if keep else 0), chunk)
                if tokens >= least:
                    # Small chunks are for rows that would not fit, not for more rows in a pass.
                    tokens = tokens if chunk == _CHUNKS[0] else least
                    if asked is None and mode == "offload":
                        tokens = min(tokens, int(host_bytes * _SHARE) // on_host)
                    return PassPlan(mode, min(tokens, limit), keep, chunk)
    last = modes[-1]
    return PassPlan(last, max(1, min(most(last, budget, _CHUNKS[-1]), limit)), chunk=_CHUNKS[-1], fits=False)
