"""How many tokens one pass may have, and whether layers keep their activations, from the memory there is.

The count of bytes follows what `nn.layer_node` keeps. Rows are put into passes by `data.passes`.
"""

from dataclasses import dataclass

from jebi.kernels.linear_cross_entropy import CHUNK_BYTES
from jebi.models.decoder import Checkpointing
from jebi.models.families import DecoderShape

CPU_PASS_TOKENS = 2048
"""On a CPU longer passes gain nothing: a pass of this many tokens already runs its products at full rate."""
GPU_PASS_TOKENS = 8192
"""On a card passes beyond this gain nothing either (Llama 8B, H100: 4,096 and 8,192 tokens run at the same rate), and
their buffers only grow."""
TRAINED_BYTES = 12
"""What a trained number takes in training beside itself: its gradient and two moments in float32."""
_SHARE = 0.8
"""Of the free memory; the rest is for the allocator's slack."""


@dataclass(frozen=True)
class PassPlan:
    """What a training pass may hold."""

    checkpointing: Checkpointing
    """What layers do with their activations."""
    tokens: int
    """Most tokens of one pass; a longer row is a pass of its own."""
    keep_weights: bool = False
    """Whether 4-bit and 8-bit weights are kept dequantised for all passes, instead of once a use."""
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
    attention = (2 * layer.heads + 2 * layer.kv_heads) * layer.head_dim
    # Norms within the blocks keep their inputs.
    if layer.qk_norm:
        attention += (layer.heads + layer.kv_heads) * layer.head_dim
    normed = 2 * layer.width if layer.sandwich else 0
    statistics = 4 * (2 + layer.heads)
    return len(shape.layers) * ((normed + 2 * layer.width + attention + 2 * layer.ffn) * element + statistics)


def work_bytes_per_token(shape: DecoderShape, element: int) -> int:
    """Bytes that one token needs while a layer's backward is under way: its activations and their gradients."""
    layer = shape.layer
    attention = (3 * layer.heads + 4 * layer.kv_heads) * layer.head_dim
    return (8 * layer.width + 2 * attention + 6 * layer.ffn) * element


def choose(
    shape: DecoderShape,
    element: int,
    free_bytes: int,
    longest_row: int,
    asked: Checkpointing | None,
    limit: int,
    weights: int = 0,
) -> PassPlan:
    """The fastest plan that fits: keep everything if passes then still hold the longest row, else recompute.

    Weights are kept dequantised where that leaves room for everything else: a pass of 4,096 tokens spends a twentieth
    of its time on dequantising them, recomputing a fifth.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        free_bytes: memory that training may take beside the loaded model.
        longest_row: tokens of the longest row.
        asked: what the user named, which is obeyed; None lets the plan choose.
        limit: most tokens worth having in a pass.
        weights: bytes that keeping packed weights dequantised would take.
    """
    budget = int(free_bytes * _SHARE) - 2 * CHUNK_BYTES
    least = max(longest_row, limit // 8)
    modes: tuple[Checkpointing, ...] = (asked,) if asked is not None else ("none", "recompute")
    for mode in modes:
        per_token = kept_bytes_per_token(shape, element, mode) + work_bytes_per_token(shape, element)
        for keep in (True, False) if weights else (False,):
            tokens = max(0, budget - (weights if keep else 0)) // per_token
            if tokens >= least:
                return PassPlan(mode, min(tokens, limit), keep)
    return PassPlan(modes[-1], max(1, min(tokens, limit)), fits=False)
