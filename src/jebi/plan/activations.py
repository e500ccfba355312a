"""Bytes of a pass: what layers keep of a token until its backward, and what is at work at one time.

The counts follow `nn.layer_node`; tests hold them against the tensors that it keeps. No torch here.
"""

from dataclasses import dataclass

from jebi.config import Checkpointing
from jebi.config.limits import TOKEN_HEADS, chunk_tokens
from jebi.models.families import DecoderShape

_INPUTS = 36
"""Bytes of a captured pass's inputs for each token."""


@dataclass(frozen=True)
class AdapterRanks:
    """Of the adapters of all layers: numbers that a token has of ``x A^T``."""

    every: int = 0
    """Of all maps."""
    wide: int = 0
    """Of gate and up."""


@dataclass(frozen=True)
class Pass:
    """What a training pass is, for the count of its memory."""

    tokens: int
    """Most tokens that it really has."""
    checkpointing: Checkpointing
    """What layers keep."""
    chunk: int
    """Tokens that layers take at a time, where they recompute."""
    keep_weights: bool = False
    """Whether packed weights are kept as they are multiplied."""
    kept_layers: int = 0
    """Layers that keep everything whatever the others do."""
    shipped_layers: int = 0
    """Of the others those that send gate and up to host memory beside their input."""
    sizes: int = 1
    """Different numbers of tokens that a run's passes have."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes of a pass at its peak."""

    kept: int
    """What all layers keep on the device until their backward."""
    work: int
    """What is at work beside it while a layer's backward is under way."""
    loss: int
    """What is at work while the loss is made, before any backward."""
    inputs: int
    """Ids, positions, labels and counts of a captured pass; as many lie pinned in host memory."""
    host_inputs: int
    """Layers' inputs in host memory, and attention's outputs."""
    host_wide: int
    """Gate and up there."""

    @property
    def device(self) -> int:
        """All that is on the device."""
        return self.kept + max(self.work, self.loss) + self.inputs

    @property
    def host(self) -> int:
        """Activations in host memory."""
        return self.host_inputs + self.host_wide


def pass_bytes(
    shape: DecoderShape, element: int, made: Pass, on_card: bool, ranks: AdapterRanks = AdapterRanks()
) -> PassBytes:
    """What a pass takes.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        made: the pass.
        on_card: whether a card computes; elsewhere host memory is the device's, and what would be sent there stays.
        ranks: of the adapters; a layer that keeps all keeps every ``x A^T``, one that sends gate and up theirs.
    """
    layers, tokens, mode = len(shape.layers), made.tokens, made.checkpointing
    if mode == "offload" and not on_card:
        mode = "keep_attention"
    whole = layers if mode == "none" else made.kept_layers
    others = layers - whole
    kept = kept_bytes_per_token(shape, element, "none") * whole + kept_bytes_per_token(shape, element, mode) * others
    kept = (kept + (ranks.every * whole + ranks.wide * made.shipped_layers) * element) // layers
    if not on_card and element < 4:
        # There attention is computed in float32, of which a layer that keeps all keeps copies.
        layer = shape.layer
        kept += 4 * 2 * (layer.heads + layer.kv_heads) * layer.head_dim * whole
    work = work_bytes(shape, element, mode, tokens, made.chunk, on_card)
    sent = sent_bytes_per_token(shape, element) * tokens if made.shipped_layers and on_card else 0
    # Of one layer, on its way.
    work += sent
    if whole:
        work = max(work, work_bytes(shape, element, "none", tokens, made.chunk, on_card))
    on_host = host_bytes_per_token(shape, element) * others // layers if mode == "offload" else 0
    loss = loss_bytes(shape, element, tokens, on_card)
    return PassBytes(
        kept * tokens, work, loss, _INPUTS * tokens if on_card else 0, on_host * tokens, made.shipped_layers * sent
    )


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


def sent_bytes_per_token(shape: DecoderShape, element: int) -> int:
    """Bytes that one token has in host memory beside those for each layer that sends gate and up there."""
    return 2 * shape.layer.ffn * element


def work_bytes(
    shape: DecoderShape, element: int, checkpointing: Checkpointing, tokens: int, chunk: int, on_card: bool = True
) -> int:
    """Bytes of a pass, beside what layers keep, while a layer's backward is under way.

    Args:
        shape: the decoder.
        element: bytes of one activation.
        checkpointing: what layers keep.
        tokens: of the pass.
        chunk: tokens that layers take at a time, where they recompute.
        on_card: whether kernels write in place what plain torch on a CPU makes anew.
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
    # Gate and up, unless they are kept, and the gradient of their product, beside a norm's input and gradients: 3 F.
    # Fitted to Llama 8B's shape on an H200: 1.07 GiB beside all that is kept of 8,192 tokens, 0.54 where gate and up
    # are. Plain torch makes a new tensor at every step of that (counted in tests/nn/test_layer_memory).
    widths = (2, 3) if checkpointing == "none" else (3, 3)
    if not on_card:
        widths = (6, 4) if checkpointing == "none" else (8, 5)
    of_chunk = (widths[0] * layer.ffn + widths[1] * layer.width) * element
    at_once = tokens if checkpointing == "none" else min(tokens, chunk)
    # One after the other: attention's backward begins when the feed-forward block's is done.
    return tokens * whole * element + max(attention, at_once * of_chunk)


def loss_bytes(shape: DecoderShape, element: int, tokens: int, on_card: bool) -> int:
    """Bytes while the loss is made: a chunk's logits and their slopes, the last hidden states and their gradient."""
    logits = min(tokens, chunk_tokens(shape.vocabulary, on_card)) * shape.vocabulary
    # Slopes take the logits' place; on a CPU those of 16 bits are written beside float32, and so is a cap's slope.
    each = element if on_card else (4 if element == 4 else 8) + (0 if shape.logit_softcap is None else 4)
    return logits * each + 3 * tokens * shape.layer.width * element
