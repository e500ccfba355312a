"""A decoder layer as one autograd node with a hand-written backward, on flat rows.

What the plain `DecoderLayer.forward` computes, with two differences: only what the backward cannot rebuild cheaply is
kept (never a norm's output, never ``silu(gate) * up``), and a layer that keeps only its input is recomputed without
its last product, ``down_proj``, whose result no gradient needs. Attention alone is differentiated by autograd, as a
small graph inside the node, so every backend of `nn.attention` serves.

Adapter dropout is not done here; such layers take the plain form (`serves`).

Shapes: T tokens of all rows, D width, F feed-forward width, H/G query and key/value heads, d head size, r rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jebi.kernels.rms_norm import rms_norm_apply, rms_norm_backward, rms_norm_forward
from jebi.kernels.rope import rope
from jebi.kernels.swiglu import swiglu_backward, swiglu_forward
from jebi.nn.attention import attend_rows
from jebi.nn.layer import DecoderLayer
from jebi.nn.linear import Grads, adapter_backward, project, project_backward
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
    up_TF: Tensor
    xa: dict[str, Tensor | None]
    """Each projection's ``x A^T`` by name."""


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
        act_TF = swiglu_forward(kept.gate_TF, kept.up_TF)
        out_TD, kept.xa["down"] = project(layer.mlp.down_proj, act_TF)
        ctx.layer, ctx.tables, ctx.rows, ctx.trained = layer, tables, rows, trained
        ctx.kept = kept if keep == "all" else None
        ctx.device = hidden_TD.device
        ctx.save_for_backward(_to_host(hidden_TD) if keep == "input_on_host" else hidden_TD)
        return out_TD.add_(kept.middle_TD)

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
    attn, mlp = layer.self_attn, layer.mlp
    xa: dict[str, Tensor | None] = {}
    x_TD, rstd_in_T1 = rms_norm_forward(hidden_TD, layer.input_layernorm.weight, layer.shape.eps)
    q, xa["q"] = project(attn.q_proj, x_TD)
    k, xa["k"] = project(attn.k_proj, x_TD)
    v, xa["v"] = project(attn.v_proj, x_TD)
    del x_TD
    qkv = (rope(layer.heads(q), *tables), rope(layer.heads(k), *tables), layer.heads(v))
    with torch.enable_grad():
        qkv = (
            qkv[0].detach().requires_grad_(),
            qkv[1].detach().requires_grad_(),
            qkv[2].detach().requires_grad_(),
        )
        mixed_THd = attend_rows(*qkv, rows)
    middle_TD, xa["o"] = project(attn.o_proj, mixed_THd.detach().flatten(-2))
    middle_TD.add_(hidden_TD)
    x_TD, rstd_mid_T1 = rms_norm_forward(middle_TD, layer.post_attention_layernorm.weight, layer.shape.eps)
    gate_TF, xa["gate"] = project(mlp.gate_proj, x_TD)
    up_TF, xa["up"] = project(mlp.up_proj, x_TD)
    return _Kept(rstd_in_T1, qkv, mixed_THd, middle_TD, rstd_mid_T1, gate_TF, up_TF, xa)


def _feed_forward_backward(layer: DecoderLayer, kept: _Kept, dout_TD: Tensor, grads: Grads) -> Tensor:
    """Gradient of the residual stream between the blocks."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    act_TF = swiglu_forward(kept.gate_TF, kept.up_TF)
    xa_down = kept.xa.get("down")
    if xa_down is None and mlp.down_proj.adapter is not None:
        xa_down = act_TF @ mlp.down_proj.adapter.A_rK.to(act_TF.dtype).t()
    dact_TF = project_backward(mlp.down_proj, dout_TD, act_TF, xa_down, grads, None)
    del act_TF
    dgate_TF, dup_TF = swiglu_backward(dact_TF, kept.gate_TF, kept.up_TF)
    x_TD = rms_norm_apply(kept.middle_TD, kept.rstd_mid_T1, norm.weight)
    dx_TD = project_backward(mlp.gate_proj, dgate_TF, x_TD, kept.xa["gate"], grads, None)
    dx_TD = project_backward(mlp.up_proj, dup_TF, x_TD, kept.xa["up"], grads, dx_TD)
    return rms_norm_backward(dx_TD, kept.middle_TD, kept.rstd_mid_T1, norm.weight).add_(dout_TD)


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
    attn, norm = layer.self_attn, layer.input_layernorm
    mixed_TD = kept.mixed_THd.detach().flatten(-2)
    dmixed_TD = project_backward(attn.o_proj, dmiddle_TD, mixed_TD, kept.xa["o"], grads, None)
    dq, dk, dv = torch.autograd.grad(kept.mixed_THd, kept.qkv, layer.heads(dmixed_TD))
    cos, sin = tables
    dq, dk = rope(dq, cos, -sin), rope(dk, cos, -sin)
    x_TD = rms_norm_apply(hidden_TD, kept.rstd_in_T1, norm.weight)
    dx_TD: Tensor | None = None
    for proj, dy, name in ((attn.q_proj, dq, "q"), (attn.k_proj, dk, "k"), (attn.v_proj, dv, "v")):
        if needs_input:
            dx_TD = project_backward(proj, dy.flatten(-2), x_TD, kept.xa[name], grads, dx_TD)
        else:
            adapter_backward(proj, dy.flatten(-2), x_TD, kept.xa[name], grads, None)
    if dx_TD is None:
        return None
    return rms_norm_backward(dx_TD, hidden_TD, kept.rstd_in_T1, norm.weight).add_(dmiddle_TD)


def _to_host(x: Tensor) -> Tensor:
    """A copy in pinned host memory when ``x`` is on a card; ``x`` itself when it is there already."""
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
