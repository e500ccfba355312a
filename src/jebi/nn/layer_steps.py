"""What a hand-written layer does with single tokens: its parts before and behind attention, forward and backward.

No graph is made. Any number of tokens may go through at a time, all of a pass or a chunk of it: gradients of what is
trained are sums over tokens, which `add` adds up. What is kept between forward and backward, and which tokens go
together, is `layer_node`'s.

Shapes: T tokens, D width, F feed-forward width, H/G query and key/value heads, d head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.kernels.glu import Thin, glu_backward_, glu_forward
from jebi.kernels.rms_norm import (
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_summed,
    rms_norm_weight_grad,
)
from jebi.kernels.rope import adjacent, rope_, rope_added, rope_into
from jebi.nn import group
from jebi.nn.layer import DecoderLayer, LayerGroups, Norm, parts
from jebi.nn.linear import Grads


@dataclass
class Normed:
    """A norm's input, kept for its backward, and its statistics."""

    x: Tensor
    rstd: Tensor


@dataclass
class Turned:
    """Attention's inputs, which become their own gradients in the backward."""

    qkv: tuple[Tensor, Tensor, Tensor]
    """q (T, H, d), k and v (T, G, d), rotated."""
    qk: tuple[Normed, Normed] | None
    """Queries and keys before their norms, where they have any."""
    entries: list["Entry"]
    """Of each chunk."""


@dataclass
class Entry:
    """What the backward of the maps before attention reads beside the layer's input."""

    maps: group.Kept
    """What they keep."""
    rstd_T1: Tensor
    """The norm's statistics."""


@dataclass
class Block:
    """What the backward of everything behind attention reads, of a chunk or of all tokens."""

    middle: Normed
    """The residual stream between the two blocks, which is normed."""
    gate_TF: Tensor
    """Without what `_thin` says is still to be added; likewise up."""
    up_TF: Tensor
    groups: dict[str, group.Kept]
    """What each group of maps keeps."""
    attention_out: Normed | None
    """The attention block's output before its norm, where it has one."""
    out: Normed | None = None
    """The feed-forward block's, likewise."""


def turn(
    layer: DecoderLayer, hidden_TD: Tensor, tables: tuple[Tensor, Tensor], groups: LayerGroups | None = None
) -> Turned:
    """Queries, keys and values; here and below ``groups`` are others than the layer's own, to answer with."""
    attn = layer.self_attn
    x_TD, rstd_T1 = _norm(layer.input_layernorm, hidden_TD)
    maps, sizes = (groups or layer.groups()).qkv, layer.shape.qkv_sizes
    normed = attn.q_norm is not None and attn.k_norm is not None
    outputs, kept = maps.forward(x_TD, whole=normed)
    del x_TD
    yq, yk, yv = parts(outputs, sizes)
    if attn.q_norm is None or attn.k_norm is None:
        q, k, v = rope_added((yq, yk, yv), tables, maps.thin(kept, sizes), layer.shape.head_dim)
        layer.scale_(v)
        return Turned((q, k, v), None, [Entry(kept, rstd_T1)])
    q, k, v = layer.heads(yq), layer.heads(yk), layer.heads(yv)
    layer.scale_(v)
    raw = q, k
    (q, rstd_q), (k, rstd_k) = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
    qk = Normed(raw[0], rstd_q), Normed(raw[1], rstd_k)
    return Turned((rope_(q, *tables), rope_(k, *tables), v), qk, [Entry(kept, rstd_T1)])


@dataclass
class Wide:
    """What the maps of the feed-forward block gave: two thirds of what a layer keeps, and of the time to make it."""

    gate_up: list[Tensor]
    """Gate and up (T, F each), or one matrix with both (T, 2 * F)."""
    kept: group.Kept
    """What these maps keep."""


def behind_attention(
    layer: DecoderLayer,
    hidden_TD: Tensor,
    mixed_TD: Tensor,
    wide: Wide | None = None,
    groups: LayerGroups | None = None,
) -> Block:
    """From attention's output up to and without the gated product; ``wide`` is not made again where it is given."""
    groups, kept, attention_out = groups or layer.groups(), {}, None
    if layer.attention_out_norm is None:
        (middle_TD,), kept["o"] = groups.o.forward(mixed_TD, hidden_TD)
    else:
        (raw_TD,), kept["o"] = groups.o.forward(mixed_TD)
        middle_TD, rstd = _norm(layer.attention_out_norm, raw_TD)
        attention_out = Normed(raw_TD, rstd)
        layer.scale_(middle_TD).add_(hidden_TD)
    x_TD, rstd_T1 = _norm(layer.middle_norm, middle_TD)
    if wide is None:
        wide = Wide(*groups.gate_up.forward(x_TD, whole=False))
    kept["gate_up"] = wide.kept
    gate_TF, up_TF = parts(wide.gate_up, [layer.shape.ffn, layer.shape.ffn])
    return Block(Normed(middle_TD, rstd_T1), gate_TF, up_TF, kept, attention_out)


def wide_of(block: Block) -> Wide:
    """Gate and up of a block, which go on being its own: in one matrix where they lie in one."""
    pair = [block.gate_TF, block.up_TF]
    whole = adjacent(pair)
    return Wide(pair if whole is None else [whole], block.groups["gate_up"])


def feed_forward(layer: DecoderLayer, block: Block, groups: LayerGroups | None = None) -> Tensor:
    """The layer's output (T, D); what a norm at its end needs is kept."""
    groups = groups or layer.groups()
    thin = _thin(layer, block, groups)
    act_TF = glu_forward(block.gate_TF, block.up_TF, layer.shape.activation, thin, layer.scale)
    down = groups.down
    if layer.out_norm is None:
        (out_TD,), block.groups["down"] = down.forward(act_TF, block.middle.x)
        return out_TD
    (raw_TD,), block.groups["down"] = down.forward(act_TF)
    out_TD, rstd_T1 = _norm(layer.out_norm, raw_TD)
    block.out = Normed(raw_TD, rstd_T1)
    return layer.scale_(out_TD).add_(block.middle.x)


def _thin(layer: DecoderLayer, block: Block, groups: LayerGroups) -> Thin:
    """What is still to be added to gate and up."""
    gate, up = groups.gate_up.thin(block.groups["gate_up"], [layer.shape.ffn] * 2)
    return gate, up


def feed_forward_backward(layer: DecoderLayer, block: Block, dout_TD: Tensor, dmiddle_TD: Tensor, grads: Grads) -> None:
    """Gradient of the residual stream between the blocks, into ``dmiddle_TD``, which may be ``dout_TD``."""
    groups, dblock_TD = layer.groups(), dout_TD
    if layer.out_norm is not None:
        if block.out is None:
            feed_forward(layer, block)
        assert block.out is not None
        dblock_TD = _norm_backward(layer.out_norm, layer.scaled(dout_TD), block.out, grads)
    dact_TF, shares = groups.down.backward_input([dblock_TD], whole=False)
    assert dact_TF is not None
    down_kept = block.groups.get("down")
    # The product itself is needed only where the adapter's gradients do not come with it.
    wants_act = shares.thin is None or down_kept is None
    thin, kind = _thin(layer, block, groups), layer.shape.activation
    made = glu_backward_(dact_TF, block.gate_TF, block.up_TF, kind, thin, shares.thin, wants_act, layer.scale)
    *up_sums, down_sum = made.sums
    groups.down.backward_trained(shares, made.act_TF, down_kept, grads, group.Sums(down_sum))
    dgate_up = [made.gate_TF, made.up_TF]
    del made, dact_TF, shares
    dx_TD, shares = groups.gate_up.backward_input(dgate_up)
    assert dx_TD is not None
    x_TD, dA_RD = _input(layer.middle_norm, block.middle, shares)
    sums = group.Sums(dA_RD, tuple(up_sums))
    groups.gate_up.backward_trained(shares, x_TD, block.groups["gate_up"], grads, sums)
    _norm_backward(layer.middle_norm, dx_TD, block.middle, grads, dout_TD, dmiddle_TD)


def o_backward(layer: DecoderLayer, block: Block, mixed_TD: Tensor, dmiddle_TD: Tensor, grads: Grads) -> Tensor:
    """Gradient of attention's output."""
    groups, dblock_TD = layer.groups(), dmiddle_TD
    if layer.attention_out_norm is not None:
        assert block.attention_out is not None
        dblock_TD = _norm_backward(layer.attention_out_norm, layer.scaled(dmiddle_TD), block.attention_out, grads)
    dmixed_TD, shares = groups.o.backward_input([dblock_TD])
    assert dmixed_TD is not None
    groups.o.backward_trained(shares, mixed_TD, block.groups["o"], grads)
    return dmixed_TD


def turn_back(
    layer: DecoderLayer, turned: Turned, number: int, heads: slice, dy: Tensor, tables: tuple[Tensor, Tensor]
) -> Grads:
    """Write the gradient of what a map gave over what it became, for some heads; those of the heads' norm.

    Args:
        layer: the layer.
        turned: what attention has read.
        number: 0 for queries, 1 for keys, 2 for values.
        heads: which heads.
        dy: gradient of these, turned; it may be written over.
        tables: cosines and sines.
    """
    grads: Grads = {}
    place = turned.qkv[number][:, heads]
    norm = (layer.self_attn.q_norm, layer.self_attn.k_norm, None)[number]
    if number == 2:
        place.copy_(layer.scaled(dy))
    elif norm is None:
        rope_into(dy, *tables, place, backwards=True)
    else:
        assert turned.qk is not None
        raw = turned.qk[number]
        normed = Normed(raw.x[:, heads], raw.rstd[:, heads].contiguous())
        place.copy_(_norm_backward(norm, rope_(dy, *tables, backwards=True), normed, grads))
    return grads


def before_attention_backward(
    layer: DecoderLayer, hidden_TD: Tensor, dturned: list[Tensor], entry: Entry, dstream_TD: Tensor, wanted: bool
) -> Grads:
    """Gradient of the layer's input, added to ``dstream_TD`` where it is wanted; those of what is trained.

    Args:
        layer: the layer.
        hidden_TD: its input.
        dturned: gradients of what the maps gave (T, N each), where `turn_back` has put them.
        entry: what was kept of these tokens.
        dstream_TD: gradient of the stream between the blocks.
        wanted: whether the input or its norm need one.
    """
    norm, maps = layer.input_layernorm, layer.groups().qkv
    grads: Grads = {}
    dx_TD, shares = maps.backward_input(dturned, wanted)
    normed = Normed(hidden_TD, entry.rstd_T1)
    x_TD, dA_RD = _input(norm, normed, shares)
    maps.backward_trained(shares, x_TD, entry.maps, grads, group.Sums(dA_RD))
    if dx_TD is not None:
        _norm_backward(norm, dx_TD, normed, grads, dstream_TD, dstream_TD)
    return grads


def add(grads: Grads, some: Grads) -> None:
    """Add a chunk's gradients, which are float32."""
    for parameter, grad in some.items():
        grads[parameter] = grads[parameter].add_(grad) if parameter in grads else grad


def _input(norm: Norm, normed: Normed, shares: group.Shares) -> tuple[Tensor | None, Tensor | None]:
    """What the gradients of maps behind a norm need of its output: itself, or only its sum with ``dxa``, that of A.

    Not in float16, where the product with the statistics might leave its range.
    """
    if shares.dxa_TR is None or shares.dxa_TR.dtype == torch.float16:
        return _norm(norm, normed.x)[0], None
    return None, rms_norm_summed(shares.dxa_TR, normed.x, normed.rstd, norm.weight, norm.unit_offset)


def _norm(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_forward(x, norm.weight, norm.eps, norm.unit_offset)


def _norm_backward(
    norm: Norm, dy: Tensor, kept: Normed, grads: Grads, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Gradient of a norm's input, ``residual`` added; a trained weight's goes into ``grads``."""
    if norm.weight.requires_grad:
        grads[norm.weight] = rms_norm_weight_grad(dy, kept.x, kept.rstd)
    return rms_norm_backward(dy, kept.x, kept.rstd, norm.weight, norm.unit_offset, residual, out)
