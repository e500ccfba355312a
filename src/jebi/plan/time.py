"""How long a training step takes, from its FLOPs and bytes and a card's rates.

A pass is products, attention, and what only reads and writes; a step is its passes and what the host does. The parts
were fitted to a profile of Llama 8B's shape (H100, a pass of 8,192 tokens in rows of 2,048, everything kept): 472 ms,
of which products 325, attention 41, the rest 105; 16,500 tokens/s, recomputing 12,200.
"""

import math
from dataclasses import dataclass, replace

from jebi.plan.activations import Pass, host_bytes_per_token
from jebi.plan.cards import Card
from jebi.plan.held import Held
from jebi.plan.ranks import links_of, step_bytes, waiting
from jebi.quant.footprint import weight_bytes

_HOST_SECONDS, _MATRIX_SECONDS = 0.008, 16e-6
"""Of a step, and of each trained matrix in it: optimizer, logging, launches. Fitted to 23 trainings on an H200, whose
steps took 19 ms to 1.3 s."""
_READ_FORWARD, _READ_BACKWARD = (9, 18), (18, 35)
"""Numbers that a token reads and writes in a layer beside its products: multiples of F and of D, fitted (105 ms)."""
_QUANTISED = 10
"""Multiples of D and F that scaling operands to 8 bits reads and writes in all (0.3 ms a layer of 4,096 tokens)."""
_ATTENTION, _ATTENTION_ROW = 0.8, 1200
"""Attention reaches 0.8 n / (n + 1,200) of the products' rate in rows of n tokens: 376 TFLOP/s at 2,048, 542 at
16,384."""
_MEASURED_ROW = 2048
"""Tokens of the rows in which `Card.attention` is measured."""
_FORWARD = 1.25
"""A forward takes so many times its products (H200, Llama 8B's shape: 24 us a token, of which products 19)."""
_BACKWARD = 2.5
"""Attention's backward has five products for its forward's two."""


@dataclass(frozen=True)
class Load:
    """The rows of one step."""

    tokens: float
    """Of the step, beginnings in common once."""
    row: float
    """Tokens of a row, by which attention goes: the mean, each token counted."""
    learnt: float = 1.0
    """Share of the tokens that are learnt."""
    passes: float = 1.0
    """Passes they are run in."""
    whole: float | None = None
    """Tokens of the step's rows, of which attention sees each whole; None where nothing is held once."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what takes them."""

    products: float
    """Of the layers, adapters included."""
    attention: float
    """Scores and mixing."""
    head: float
    """Logits of learnt tokens, and their gradient."""
    traffic: float
    """What only reads and writes: norms, RoPE, GLU, casts, dequantisation."""
    bus: float
    """Crossing to host memory and back, as far as nothing hides it."""
    host: float
    """The host."""
    spread: float
    """Share by which it may be off."""
    links: float = 0.0
    """What the links between several processes add."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.products + self.attention + self.head + self.traffic + self.bus + self.host + self.links

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that is likely."""
        return self.seconds * (1 - self.spread), self.seconds * (1 + self.spread)


def step_time(held: Held, made: Pass, load: Load, card: Card) -> StepTime:
    """Seconds of a step: of one process alone, or of several that take one each.

    Args:
        held: the model and its adapter.
        made: how passes are made.
        load: the rows.
        card: the rates.
    """
    shape, layer, layers = held.shape, held.shape.layer, len(held.shape.layers)
    mode, again = made.checkpointing, 1 - made.kept_layers / layers
    recomputed = 0.0 if mode == "none" else again
    weights, adapter = held.projected, sum(held.matrices)
    # Recomputing leaves out the last product, which no gradient needs.
    without_last = weights - layers * layer.ffn * layer.width
    spared = made.shipped_layers * 2 * layer.ffn * layer.width
    forward = load.tokens * (2 * weights + 2 * (recomputed * without_last - spared))
    backward = load.tokens * 2 * weights
    thin = load.tokens * (2 * weights if held.storage == "masters" else adapter * (6 + 2 * recomputed))
    # Of one token: two products of a row's half, of each layer's heads.
    scores = sum(
        2 * one.heads * one.head_dim * min(load.row, 2 * (one.attention.window or load.row)) for one in shape.layers
    )
    remade = recomputed if mode == "recompute" else 0.0
    attention = (load.whole or load.tokens) * scores * (1 + _BACKWARD + remade)
    scoring = card.products * _efficiency(load.row)
    if card.attention is not None:
        scoring *= card.attention / (card.products * _efficiency(_MEASURED_ROW))
    head = 4 * shape.vocabulary * layer.width * load.tokens * load.learnt
    alone = StepTime(
        products=forward / _forward_rate(held, card) + backward / _rate(held, card) + thin / card.products,
        attention=attention / scoring,
        head=head / card.products,
        traffic=_traffic(held, made, load, recomputed) / card.bandwidth,
        bus=_bus(held, made, load) / card.bus,
        host=_HOST_SECONDS + _MATRIX_SECONDS * len(held.matrices),
        spread=card.spread,
    )
    sent = step_bytes(held, load.passes)
    return replace(alone, links=waiting(alone.seconds, sent, held.world.ranks, *links_of(held.world, card)))


def carried_bytes(held: Held, card: Card) -> int:
    """Bytes of a token that cross the bus while its forward lasts; 0 where rates are not known, or layers divided."""
    if held.world.shares > 1:
        return 0
    carried = card.bus * _FORWARD * 2 * held.projected / _forward_rate(held, card)
    return int(carried) if math.isfinite(carried) else 0


def _rate(held: Held, card: Card) -> float:
    """Of the base's products backward."""
    return card.fp8 if held.fp8 and card.fp8 else card.products


def _forward_rate(held: Held, card: Card) -> float:
    return card.products if held.exact_forward else _rate(held, card)


def _efficiency(row: float) -> float:
    """Share of the products' rate that attention reaches in rows of so many tokens."""
    return _ATTENTION * row / (row + _ATTENTION_ROW)


def _traffic(held: Held, made: Pass, load: Load, recomputed: float) -> float:
    """Bytes read and written beside products."""
    layer, layers = held.shape.layer, len(held.shape.layers)
    numbers = sum((f * layer.ffn + d * layer.width) * times for (f, d), times in (
        (_READ_FORWARD, 1 + recomputed), (_READ_BACKWARD, 1),
    ))  # fmt: skip
    if held.fp8:
        numbers += _QUANTISED * (layer.ffn + layer.width) * (0.5 if held.exact_forward else 1)
    read = load.tokens * layers * numbers * held.element
    if held.packed and not made.keep_weights:
        uses = 2 + recomputed
        chunks = load.tokens / made.chunk if made.checkpointing != "none" else 0.0
        each = weight_bytes(held.storage, held.projected, held.element) + 2 * held.projected * held.element
        read += uses * max(load.passes, chunks) * each
    return read


def _bus(held: Held, made: Pass, load: Load) -> float:
    """Bytes over the bus that nothing hides: a head out of host memory, once a pass; a tenth of what is offloaded."""
    shape = held.shape
    crossed = 0.0
    if held.places.head == "host":
        crossed += load.passes * shape.vocabulary * shape.layer.width * held.element
    if made.checkpointing == "offload":
        sent = 1 - made.kept_layers / len(shape.layers)
        crossed += 0.1 * 2 * load.tokens * sent * host_bytes_per_token(shape, held.element)
    return crossed
