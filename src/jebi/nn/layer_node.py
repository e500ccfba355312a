"""A decoder layer as one autograd node with a hand-written backward, on flat rows.

What the plain `DecoderLayer.forward` computes, with two differences: only what the backward cannot rebuild cheaply is
kept (never a pre-norm's output, never ``act(gate) * up``), and a layer that keeps only its input is recomputed without
its last product, ``down_proj``, whose result no gradient needs (unless it is normed).

A layer that keeps only its input does what concerns single tokens (norms, products, RoPE, GLU) chunk by chunk, forward
and backward, so that nothing of width F, nor the stream between the blocks, ever exists for all tokens. Attention alone
sees the whole rows (`nn.attention_pair`), and its gradients are written over its inputs, a few heads at a time. So of
tensors as large as the input (T, D), where q, k and v together are Q of them (1.5 in Llama 3.1 8B), there are at most

- forward: 2 + Q (input, attention's output, q, k and v), then 3 (input, attention's output, output);
- backward: 4 + Q (input, attention's output and its gradient, the stream's gradient, q, k and v), one more where the
  incoming gradient must be left alone, and two more that are on their way from host memory for the next layer;

and beside them one chunk's, and a few heads' workspace.

Adapter dropout is not done here; such layers take the plain form (`serves`).

Shapes: T tokens of all rows, or of a chunk, D width, F feed-forward width, H/G query and key/value heads, d head size,
r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jebi.config.limits import CHUNK_TOKENS
from jebi.nn import sharding
from jebi.nn.attention import attend_rows
from jebi.nn.attention_pair import Attended, attention_backward, attention_forward
from jebi.nn.host_memory import HostMemory
from jebi.nn.layer import DecoderLayer, LayerGroups
from jebi.nn.layer_steps import (
    Block,
    Normed,
    Turned,
    Wide,
    add,
    before_attention_backward,
    behind_attention,
    feed_forward,
    feed_forward_backward,
    o_backward,
    turn,
    turn_back,
    wide_of,
)
from jebi.nn.linear import Grads
from jebi.nn.rows import Rows

Keep = Literal["all", "input_and_attention", "input", "input_on_host"]
"""What a layer keeps from its forward: what its backward reads; its input and, where `attention_pair` can, attention's
output; only its input; or input and attention's output in host memory, gate and up perhaps too (`Keeping.wide`)."""


def serves(layer: DecoderLayer) -> bool:
    """Whether the hand-written form covers this layer as it is set up now."""
    return all(p.adapter is None or p.adapter.dropout == 0 for _, p in layer.projections())


@dataclass(frozen=True)
class Keeping:
    """What a layer keeps, and how it saves memory."""

    keep: Keep = "all"
    """What it keeps."""
    chunk: int = CHUNK_TOKENS
    """Most tokens of a chunk, where not all is kept."""
    host: HostMemory | None = None
    """Where layers of one forward pass keep what goes to host memory."""
    wide: HostMemory | None = None
    """Where gate and up are kept too, by layers whose input is in host memory; without it they are made again."""
    spend_gradient: bool = False
    """Whether the gradient that comes in may be written over: nothing else reads it."""


def run_layer(
    layer: DecoderLayer, hidden_TD: Tensor, tables: tuple[Tensor, Tensor], rows: Rows, keep: Keep | Keeping
) -> Tensor:
    """The layer's output (T, D), differentiable by the hidden states and every trained parameter of the layer."""
    keeping = keep if isinstance(keep, Keeping) else Keeping(keep)
    trained = [p for p in layer.parameters() if p.requires_grad]
    out_TD: Tensor = _LayerNode.apply(hidden_TD, layer, tables, rows, keeping, *trained)
    return out_TD


@torch.no_grad()
def run_without_graph(
    layer: DecoderLayer,
    hidden_TD: Tensor,
    tables: tuple[Tensor, Tensor],
    rows: Rows,
    chunk: int,
    take: Callable[[Tensor, Tensor], None],
) -> Tensor:
    """The layer's output (T, D) alone, ``chunk`` tokens at a time; ``take`` is given its keys and values (T, G, d)."""
    given, groups = _Given(hidden_TD, tables, rows, _chunks(hidden_TD, Keeping("input", chunk))), layer.answering
    q_THd, k_TGd, v_TGd = _turned(layer, given, groups).qkv
    take(k_TGd, v_TGd)
    mixed_TD = attend_rows(q_THd, k_TGd, v_TGd, rows, layer.shape.attention).flatten(-2)
    del q_THd, k_TGd, v_TGd
    out_TD = None
    for part in given.chunks:
        done_TD = feed_forward(layer, behind_attention(layer, hidden_TD[part], mixed_TD[part], groups=groups), groups)
        out_TD = _written(out_TD, done_TD, part, hidden_TD.shape[0])
    assert out_TD is not None
    return out_TD


@dataclass
class _Given:
    """What a layer is given, and the chunks it goes through."""

    hidden_TD: Tensor
    tables: tuple[Tensor, Tensor]
    rows: Rows
    chunks: list[slice]


@dataclass
class _Kept:
    """What a layer's backward has of what its forward made."""

    turned: Turned | None = None
    attended: Attended | None = None
    block: Block | None = None
    """Of all tokens."""
    wide: list[Wide] = field(default_factory=list)
    """Of each chunk."""


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        layer: DecoderLayer,
        tables: tuple[Tensor, Tensor],
        rows: Rows,
        keeping: Keeping,
        *trained: nn.Parameter,
    ) -> Tensor:
        ctx.layer, ctx.tables, ctx.rows, ctx.keeping, ctx.trained = layer, tables, rows, keeping, trained
        ctx.kept = ctx.host = None
        sharding.enter(layer.shard)
        if keeping.keep == "input_on_host" and any(ctx.needs_input_grad):
            ctx.host = keeping.host or HostMemory(hidden_TD.device)
            ctx.slot = ctx.host.begin()
            ctx.host.put(ctx.slot, hidden_TD)
            if keeping.wide is not None:
                ctx.wide_slot, ctx.wide_kept = keeping.wide.begin(), []
        else:
            ctx.save_for_backward(hidden_TD)
        given = _Given(hidden_TD, tables, rows, _chunks(hidden_TD, keeping))
        turned = _turned(layer, given)
        attended = attention_forward(*turned.qkv, rows, layer.shape.attention)
        if ctx.host is not None:
            ctx.way, ctx.seeds = attended.way, attended.seeds
            ctx.host.put(ctx.slot, *attended.storable())
        kept = None
        if keeping.keep == "all":
            kept = _Kept(turned, attended)
        elif keeping.keep == "input_and_attention" and attended.storable():
            kept = _Kept(attended=attended)
        mixed_TD = attended.mixed(rows, hidden_TD.dtype).flatten(-2)
        del turned, attended
        out_TD = None
        for chunk in given.chunks:
            block = behind_attention(layer, hidden_TD[chunk], mixed_TD[chunk])
            out_TD = _written(out_TD, feed_forward(layer, block), chunk, hidden_TD.shape[0])
            if kept is not None and keeping.keep == "all":
                kept.block = block
            if ctx.host is not None and keeping.wide is not None:
                wide = wide_of(block)
                keeping.wide.put(ctx.wide_slot, *wide.gate_up)
                ctx.wide_kept.append((len(wide.gate_up), wide.kept))
                del wide
            del block  # before the next one is made
        ctx.kept = kept
        sharding.leave(layer.shard, again=any(ctx.needs_input_grad))
        assert out_TD is not None
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept or _Kept(), None
        layer, rows, keeping = ctx.layer, ctx.rows, ctx.keeping
        sharding.enter(layer.shard, backward=True)
        if ctx.host is None:
            (hidden_TD,) = ctx.saved_tensors
        else:
            hidden_TD, *mixed = ctx.host.take(ctx.slot)
            kept.attended = Attended(ctx.way, mixed[0], mixed[1], ctx.seeds) if mixed else None
            del mixed
            if keeping.wide is not None:
                gate_up = keeping.wide.take(ctx.wide_slot)
                kept.wide = [Wide([gate_up.pop(0) for _ in range(n)], of_maps) for n, of_maps in ctx.wide_kept]
        given = _Given(hidden_TD, ctx.tables, rows, _chunks(hidden_TD, keeping))
        dout_TD = grad_outputs[0].contiguous()
        # First the gradient of the stream between the blocks, then that of the layer's input.
        dstream_TD = dout_TD if keeping.spend_gradient else torch.empty_like(dout_TD)
        grads: Grads = {}
        if kept.attended is None:
            kept.turned = _turned(layer, given)
            kept.attended = attention_forward(*kept.turned.qkv, rows, layer.shape.attention)
        dmixed_TD = _behind_attention_backward(layer, given, kept, dout_TD, dstream_TD, grads)
        turned = kept.turned or _turned(layer, given)
        _attention_backward(layer, given, turned, kept.attended, dmixed_TD, grads)
        del kept, dmixed_TD
        wanted = ctx.needs_input_grad[0] or layer.input_layernorm.weight.requires_grad
        for chunk, of_chunk in zip(given.chunks, turned.entries, strict=True):
            dturned = [dy[chunk].flatten(-2) for dy in turned.qkv]
            add(
                grads,
                before_attention_backward(layer, hidden_TD[chunk], dturned, of_chunk, dstream_TD[chunk], wanted),
            )
        sharding.leave(layer.shard, backward=True)
        return dstream_TD if wanted else None, None, None, None, None, *(grads.get(p) for p in ctx.trained)


def _turned(layer: DecoderLayer, given: _Given, groups: LayerGroups | None = None) -> Turned:
    """Queries, keys and values of all tokens, ready for attention."""
    if len(given.chunks) == 1:
        return turn(layer, given.hidden_TD, given.tables, groups)
    tokens, hidden_TD = given.hidden_TD.shape[0], given.hidden_TD
    # Columns of one matrix, so that their gradients, which take their place, go through one product.
    whole_TN = torch.empty(tokens, sum(layer.shape.qkv_sizes), dtype=hidden_TD.dtype, device=hidden_TD.device)
    q, k, v = (layer.heads(y) for y in whole_TN.split(layer.shape.qkv_sizes, dim=1))
    raw: list[Tensor | None] = [None] * 4
    entries = []
    for chunk in given.chunks:
        part = turn(layer, hidden_TD[chunk], (given.tables[0][chunk], given.tables[1][chunk]), groups)
        for whole, piece in zip((q, k, v), part.qkv):
            whole[chunk] = piece
        entries += part.entries
        if part.qk is not None:
            pieces = [piece for normed in part.qk for piece in (normed.x, normed.rstd)]
            raw = [_written(whole, piece, chunk, tokens) for whole, piece in zip(raw, pieces)]
    xq, rstd_q, xk, rstd_k = raw
    if xq is None or rstd_q is None or xk is None or rstd_k is None:
        return Turned((q, k, v), None, entries)
    return Turned((q, k, v), (Normed(xq, rstd_q), Normed(xk, rstd_k)), entries)


def _behind_attention_backward(
    layer: DecoderLayer, given: _Given, kept: _Kept, dout_TD: Tensor, dstream_TD: Tensor, grads: Grads
) -> Tensor:
    """Gradient of attention's output (T, H * d); that of the stream between the blocks goes into ``dstream_TD``."""
    assert kept.attended is not None
    mixed_TD = kept.attended.mixed(given.rows, dout_TD.dtype).flatten(-2)
    dmixed_TD = None
    for chunk in given.chunks:
        wide = kept.wide.pop(0) if kept.wide else None
        block, kept.block = kept.block or behind_attention(layer, given.hidden_TD[chunk], mixed_TD[chunk], wide), None
        some: Grads = {}
        feed_forward_backward(layer, block, dout_TD[chunk], dstream_TD[chunk], some)
        dmixed = o_backward(layer, block, mixed_TD[chunk], dstream_TD[chunk], some)
        dmixed_TD = _written(dmixed_TD, dmixed, chunk, dout_TD.shape[0])
        add(grads, some)
        del block, wide, dmixed  # before the next ones are made
    assert dmixed_TD is not None
    return dmixed_TD


def _attention_backward(
    layer: DecoderLayer, given: _Given, turned: Turned, attended: Attended, dmixed_TD: Tensor, grads: Grads
) -> None:
    """Gradients of what the maps gave, written over ``turned``."""

    def take(heads: slice, groups: slice, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        for number, (part, dy) in enumerate(((heads, dq), (groups, dk), (groups, dv))):
            add(grads, turn_back(layer, turned, number, part, dy, given.tables))

    form = layer.shape.attention
    attention_backward(layer.heads(dmixed_TD), turned.qkv, attended, given.rows, form, take)


def _chunks(hidden_TD: Tensor, keeping: Keeping) -> list[slice]:
    """One chunk where all is kept: its parts would have to be laid together."""
    tokens = hidden_TD.shape[0]
    step = tokens if keeping.keep == "all" else keeping.chunk
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _written(whole: Tensor | None, part: Tensor, chunk: slice, tokens: int) -> Tensor:
    """The tensor of all tokens with a chunk's part in it; the part itself where it is all."""
    if part.shape[0] == tokens:
        return part
    if whole is None:
        whole = torch.empty(tokens, *part.shape[1:], dtype=part.dtype, device=part.device)
    whole[chunk] = part
    return whole
