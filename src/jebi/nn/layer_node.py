"""A decoder layer as one autograd node with a hand-written backward, on flat rows.

What the plain `DecoderLayer.forward` computes, with two differences: only what the backward cannot rebuild cheaply is
kept (never a pre-norm's output, never ``act(gate) * up``), and a layer that keeps only its input is recomputed without
its last product, ``down_proj``, whose result no gradient needs (unless it is normed). Attention alone is differentiated
by autograd, as a small graph inside the node, so every backend of `nn.attention` serves.

Adapter dropout is not done here; such layers take the plain form (`serves`).

Shapes: T tokens of all rows, D width, F feed-forward width, H/G query and key/value heads, d head size, r rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jebi.kernels.glu import Thin, glu_backward_, glu_forward
from jebi.kernels.rms_norm import rms_norm_apply, rms_norm_backward, rms_norm_forward, rms_norm_weight_grad
from jebi.kernels.rope import rope_, rope_into
from jebi.nn import group
from jebi.nn.attention import attend_rows
from jebi.nn.layer import DecoderLayer, Norm, parts
from jebi.nn.linear import Grads
from jebi.nn.rows import Rows

Keep = Literal["all", "input", "input_on_host"]
"""What a layer keeps from its forward: what its backward reads, only its input, or its input in host memory."""


def serves(layer: DecoderLayer) -> bool:
    """Whether the hand-written form covers this layer as it is set up now."""
    return all(p.adapter is None or p.adapter.dropout == 0 for _, p in layer.projections())


def run_layer(layer: DecoderLayer, hidden_TD: Tensor, tables: tuple[Tensor, Tensor], rows: Rows, keep: Keep) -> Tensor:
    """The layer's output (T, D), differentiable by the hidden states and every trained parameter of the layer."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    out_TD: Tensor = _LayerNode.apply(hidden_TD, layer, tables, rows, keep, *trained)
    return out_TD


@dataclass
class _Normed:
    """A norm's input, kept for its backward, and its statistics."""

    x: Tensor
    rstd: Tensor


@dataclass
class _Kept:
    """What a layer's backward reads beside its input."""

    rstd_in_T1: Tensor
    qkv: tuple[Tensor, Tensor, Tensor]
    """Inputs of the attention graph: q (T, H, d), k and v (T, G, d), rotated."""
    mixed_THd: Tensor
    """The attention graph's output."""
    middle_TD: Tensor
    """The residual stream between the two blocks."""
    rstd_mid_T1: Tensor
    gate_TF: Tensor
    """Without what `_thin` says is still to be added; likewise up."""
    up_TF: Tensor
    groups: dict[str, group.Kept]
    """What each group of maps keeps."""
    qk: tuple[_Normed, _Normed] | None
    """Queries and keys before their norms, where they have any."""
    attention_out: _Normed | None
    """The attention block's output before its norm, where it has one."""
    out: _Normed | None = None
    """The feed-forward block's, likewise."""


class _LayerNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        layer: DecoderLayer,
        tables: tuple[Tensor, Tensor],
        rows: Rows,
        keep: Keep,
        *trained: nn.Parameter,
    ) -> Tensor:
        kept = _forward(layer, hidden_TD, tables, rows)
        out_TD = _feed_forward(layer, kept)
        ctx.layer, ctx.tables, ctx.rows, ctx.trained = layer, tables, rows, trained
        ctx.kept = kept if keep == "all" else None
        ctx.device = hidden_TD.device
        ctx.save_for_backward(_to_host(hidden_TD) if keep == "input_on_host" else hidden_TD)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD = ctx.saved_tensors[0].to(ctx.device, non_blocking=True)
        kept = ctx.kept or _forward(ctx.layer, hidden_TD, ctx.tables, ctx.rows)
        ctx.kept = None
        grads: Grads = {}
        dmiddle_TD = _feed_forward_backward(ctx.layer, kept, grad_outputs[0], grads)
        dhidden_TD = _attention_backward(
            ctx.layer, kept, hidden_TD, ctx.tables, dmiddle_TD, grads, ctx.needs_input_grad[0]
        )
        return dhidden_TD, None, None, None, None, *(grads.get(p) for p in ctx.trained)


def _forward(layer: DecoderLayer, hidden_TD: Tensor, tables: tuple[Tensor, Tensor], rows: Rows) -> _Kept:
    """The layer up to and without the gated product: what a backward needs, kept or recomputed."""
    shape, attn, groups = layer.shape, layer.self_attn, layer.groups()
    kept: dict[str, group.Kept] = {}
    x_TD, rstd_in_T1 = _norm(layer.input_layernorm, hidden_TD)
    outputs, kept["qkv"] = groups.qkv.forward(x_TD)
    del x_TD
    q, k, v = (layer.heads(y) for y in parts(outputs, shape.qkv_sizes))
    if layer.scale != 1:
        v.mul_(layer.scale)
    qk = None
    if attn.q_norm is not None and attn.k_norm is not None:
        raw = q, k
        (q, rstd_q), (k, rstd_k) = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
        qk = _Normed(raw[0], rstd_q), _Normed(raw[1], rstd_k)
    qkv = (rope_(q, *tables), rope_(k, *tables), v)
    with torch.enable_grad():
        qkv = (
            qkv[0].detach().requires_grad_(),
            qkv[1].detach().requires_grad_(),
            qkv[2].detach().requires_grad_(),
        )
        mixed_THd = attend_rows(*qkv, rows, shape.attention)
    mixed_TD = mixed_THd.detach().flatten(-2)
    attention_out = None
    if layer.attention_out_norm is None:
        (middle_TD,), kept["o"] = groups.o.forward(mixed_TD, hidden_TD)
    else:
        (raw_TD,), kept["o"] = groups.o.forward(mixed_TD)
        normed_TD, rstd = _norm(layer.attention_out_norm, raw_TD)
        attention_out = _Normed(raw_TD, rstd)
        middle_TD = torch.add(hidden_TD, normed_TD, alpha=layer.scale)
    x_TD, rstd_mid_T1 = _norm(layer.middle_norm, middle_TD)
    outputs, kept["gate_up"] = groups.gate_up.forward(x_TD, whole=False)
    gate_TF, up_TF = parts(outputs, [shape.ffn, shape.ffn])
    return _Kept(rstd_in_T1, qkv, mixed_THd, middle_TD, rstd_mid_T1, gate_TF, up_TF, kept, qk, attention_out)


def _feed_forward(layer: DecoderLayer, kept: _Kept) -> Tensor:
    """The layer's output (T, D); what a norm at its end needs is kept."""
    act_TF = glu_forward(kept.gate_TF, kept.up_TF, layer.shape.activation, _thin(layer, kept), layer.scale)
    down = layer.groups().down
    if layer.out_norm is None:
        (out_TD,), kept.groups["down"] = down.forward(act_TF, kept.middle_TD)
        return out_TD
    (raw_TD,), kept.groups["down"] = down.forward(act_TF)
    normed_TD, rstd_T1 = _norm(layer.out_norm, raw_TD)
    kept.out = _Normed(raw_TD, rstd_T1)
    return torch.add(kept.middle_TD, normed_TD, alpha=layer.scale)


def _thin(layer: DecoderLayer, kept: _Kept) -> Thin:
    """What is still to be added to gate and up."""
    gate, up = layer.groups().gate_up.thin(kept.groups["gate_up"], [layer.shape.ffn] * 2)
    return gate, up


def _feed_forward_backward(layer: DecoderLayer, kept: _Kept, dout_TD: Tensor, grads: Grads) -> Tensor:
    """Gradient of the residual stream between the blocks."""
    groups, dblock_TD = layer.groups(), dout_TD
    if layer.out_norm is not None:
        if kept.out is None:
            _feed_forward(layer, kept)
        assert kept.out is not None
        dblock_TD = _norm_backward(layer.out_norm, layer.scaled(dout_TD), kept.out, grads)
    dact_TF, shares = groups.down.backward_input([dblock_TD], whole=False)
    assert dact_TF is not None
    act_TF, *dgate_up = glu_backward_(
        dact_TF, kept.gate_TF, kept.up_TF, layer.shape.activation, _thin(layer, kept), shares.thin, layer.scale
    )
    groups.down.backward_trained(shares, act_TF, kept.groups.get("down"), grads)
    del act_TF, dact_TF, shares
    dx_TD, shares = groups.gate_up.backward_input(dgate_up)
    assert dx_TD is not None
    middle = _Normed(kept.middle_TD, kept.rstd_mid_T1)
    x_TD = _norm_apply(layer.middle_norm, middle)
    groups.gate_up.backward_trained(shares, x_TD, kept.groups["gate_up"], grads)
    return _norm_backward(layer.middle_norm, dx_TD, middle, grads, dout_TD)


def _attention_backward(
    layer: DecoderLayer,
    kept: _Kept,
    hidden_TD: Tensor,
    tables: tuple[Tensor, Tensor],
    dmiddle_TD: Tensor,
    grads: Grads,
    needs_input: bool,
) -> Tensor | None:
    """Gradient of the layer's input; None where nothing below the layer is trained."""
    groups, dblock_TD = layer.groups(), dmiddle_TD
    if layer.attention_out_norm is not None:
        assert kept.attention_out is not None
        dblock_TD = _norm_backward(layer.attention_out_norm, layer.scaled(dmiddle_TD), kept.attention_out, grads)
    dmixed_TD, shares = groups.o.backward_input([dblock_TD])
    assert dmixed_TD is not None
    groups.o.backward_trained(shares, kept.mixed_THd.detach().flatten(-2), kept.groups["o"], grads)
    dqkv = torch.autograd.grad(kept.mixed_THd, kept.qkv, layer.heads(dmixed_TD))
    turned_back = _before_rope(layer, kept, dqkv, tables, grads)
    inputs = _Normed(hidden_TD, kept.rstd_in_T1)
    needs_input = needs_input or layer.input_layernorm.weight.requires_grad
    dx_TD, shares = groups.qkv.backward_input(turned_back, needs_input)
    x_TD = _norm_apply(layer.input_layernorm, inputs)
    groups.qkv.backward_trained(shares, x_TD, kept.groups["qkv"], grads)
    if dx_TD is None:
        return None
    return _norm_backward(layer.input_layernorm, dx_TD, inputs, grads, dmiddle_TD)


def _before_rope(
    layer: DecoderLayer, kept: _Kept, dqkv: tuple[Tensor, ...], tables: tuple[Tensor, Tensor], grads: Grads
) -> list[Tensor]:
    """Gradients of the maps' outputs (T, N each) from those of turned queries and keys and of the values."""
    attn, (dq, dk, dv) = layer.self_attn, dqkv
    if layer.scale != 1:
        dv.mul_(layer.scale)
    places = layer.groups().qkv.places(layer.shape.qkv_sizes, dq.dtype, dq.shape[0])
    if attn.q_norm is not None and attn.k_norm is not None:
        assert kept.qk is not None
        dq = _norm_backward(attn.q_norm, rope_(dq, *tables, backwards=True), kept.qk[0], grads)
        dk = _norm_backward(attn.k_norm, rope_(dk, *tables, backwards=True), kept.qk[1], grads)
        return [dy.flatten(-2) for dy in (dq, dk, dv)]
    if places is None:
        dq, dk = (rope_(dy, *tables, backwards=True) for dy in (dq, dk))
        return [dy.flatten(-2) for dy in (dq, dk, dv)]
    for dy, place in zip((dq, dk), places):
        rope_into(dy, *tables, layer.heads(place), backwards=True)
    layer.heads(places[2]).copy_(dv)
    return places


def _norm(norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    return rms_norm_forward(x, norm.weight, norm.eps, norm.unit_offset)


def _norm_apply(norm: Norm, kept: _Normed) -> Tensor:
    return rms_norm_apply(kept.x, kept.rstd, norm.weight, norm.unit_offset)


def _norm_backward(norm: Norm, dy: Tensor, kept: _Normed, grads: Grads, residual: Tensor | None = None) -> Tensor:
    """Gradient of a norm's input, ``residual`` added; a trained weight's goes into ``grads``."""
    if norm.weight.requires_grad:
        grads[norm.weight] = rms_norm_weight_grad(dy, kept.x, kept.rstd)
    return rms_norm_backward(dy, kept.x, kept.rstd, norm.weight, norm.unit_offset, residual)


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned host memory when ``x`` is on a card; ``x`` itself when it is there already."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
