"""One new token a row through a decoder layer in few launches: what `layer_step.plain_step` does, for up to 16 rows.

Weights are read as they are stored; norms, biases, adapters, activation and residual come along with the products. Each
of the four groups of maps is two launches on a card (what goes before the product, and the product), attention one;
without adapters two of these fall away.

Shapes: as in `layer_step`; N outputs of q, k and v.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from jebi.kernels import few_rows
from jebi.kernels.cached_attention import Form, HeadNorms, cached_attention
from jebi.nn.few_rows_group import FewRowsGroup, laid
from jebi.nn.layer import DecoderLayer, Norm
from jebi.nn.layer_step import Now, plain_step
from jebi.nn.rotary import Tables

MOST_HEADS = 32
"""Query heads that share a head of keys, as many as attention's kernel takes."""


def lay(layer: DecoderLayer) -> None:
    """Lay the weights of a layer that is to answer, where its form and theirs allow."""
    if layer.answering is None or layer.shape.heads > MOST_HEADS * layer.shape.kv_heads:
        return
    groups = [laid(group) for group in layer.answering.stacked()]
    found = [group for group in groups if group is not None]
    if len(found) == len(groups) == 4:
        layer.few_rows = found


def few_rows_step(
    layer: DecoderLayer, hidden_BD: Tensor, tables: Tables, keys_BGLd: Tensor, values_BGLd: Tensor, now: Now
) -> Tensor:
    """See `LayerStep`; what it does not serve goes through `plain_step`."""
    if layer.few_rows is None or hidden_BD.shape[0] > few_rows.MOST:
        return plain_step(layer, hidden_BD, tables, keys_BGLd, values_BGLd, now)
    shape, (qkv, o, gate_up, down) = layer.shape, layer.few_rows
    qkv_BN = qkv.forward(hidden_BD, _form(layer.input_layernorm))
    scores = shape.attention
    form = Form(scores.scale, scores.window, scores.softcap, _head_norms(layer), layer.scale)
    held = keys_BGLd[:, :, : now.reach], values_BGLd[:, :, : now.reach]
    mixed_BN = cached_attention(qkv_BN, tables, held, now.ends_B, form, now.counts(shape.kv_heads))
    middle_BD = _out(layer, o, layer.attention_out_norm, mixed_BN, hidden_BD)
    return _out(layer, down, layer.out_norm, _gated(layer, gate_up, middle_BD), middle_BD)


def products(layer: DecoderLayer, rows: int) -> list[Callable[[], Tensor]]:
    """The products of a step of so many rows that come behind its attention, each by itself, of zeros.

    So they can be compiled beside each other. None where the layer's steps are others, or not of so many rows.
    """
    if layer.few_rows is None or rows > few_rows.MOST:
        return []
    _, o, gate_up, down = layer.few_rows
    stream_BD, mixed_BN, act_BF = (
        torch.zeros(rows, group.columns, dtype=group.dtype, device=group.maps[0].device())
        for group in (gate_up.group, o.group, down.group)
    )
    return [
        partial(_out, layer, down, layer.out_norm, act_BF, stream_BD),
        partial(_gated, layer, gate_up, stream_BD),
        partial(_out, layer, o, layer.attention_out_norm, mixed_BN, stream_BD),
    ]


def _gated(layer: DecoderLayer, gate_up: FewRowsGroup, middle_BD: Tensor) -> Tensor:
    return gate_up.forward(middle_BD, _form(layer.middle_norm), layer.shape.activation, layer.scale)


def _out(layer: DecoderLayer, maps: FewRowsGroup, norm: Norm | None, x_BN: Tensor, stream_BD: Tensor) -> Tensor:
    """A block's last map, on the stream: through its norm, where it has one, at the stream's scale."""
    if norm is None:
        return maps.forward(x_BN, residual=stream_BD)
    return layer.scale_(norm.lean(maps.forward(x_BN))).add_(stream_BD)


def _form(norm: Norm) -> few_rows.NormForm:
    return norm.weight, norm.eps, norm.unit_offset


def _head_norms(layer: DecoderLayer) -> HeadNorms | None:
    q_norm, k_norm = layer.self_attn.q_norm, layer.self_attn.k_norm
    return None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight, q_norm.eps, q_norm.unit_offset)
