"""Causal attention of flat rows as a forward and a backward of its own, for a layer that is written by hand.

The same numbers as `nn.attention.attend_rows`, from the same kernels, but what the backward reads is in plain sight:
the output and each softmax's denominator can be kept elsewhere while queries, keys and values are made again. Four
ways: cuDNN for rows of one length on a card, flash attention for others there, flash attention row by row on a CPU,
and, for all that these do not serve (capped scores, windows on a CPU, old cards, float32 on a card, heads of odd
sizes), the autograd graph of `attend_rows`, of which nothing can be kept elsewhere.

The first three call torch's operators by name. Theirs are what autograd itself calls; schemas are those of torch 2.11
to 2.13.

The backward goes through a few heads at a time where rows are long, since its workspace (a float32 gradient of the
queries, keys' and values' gradients for every query head) is larger than its inputs.

Shapes: U held tokens, T tokens of all whole rows (`nn.rows`), H query heads, G key/value heads, d head size; B rows of
S tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from jebi.config.limits import TOKEN_HEADS
from jebi.nn.attention import attend_rows, varlen_serves
from jebi.nn.rows import Rows
from jebi.nn.shape import AttentionForm

Way = Literal["cudnn", "flash", "cpu", "graph"]
_aten: Any = torch.ops.aten


@dataclass
class Attended:
    """What attention's backward reads beside queries, keys and values."""

    way: Way
    """How it was computed."""
    out_THd: Tensor
    """Output of the whole rows, in the dtype it was computed in; where a graph is kept, that of the held tokens."""
    lse: Tensor | None
    """Logarithm of each softmax's denominator, float32, laid out as its backend lays it; None where a graph is kept."""
    seeds: tuple[Tensor | None, Tensor | None] = (None, None)
    """The state of a dropout that never happens, which backwards ask for."""
    leaves: tuple[Tensor, Tensor, Tensor] | None = None
    """Inputs of the graph, where one is kept."""

    def mixed(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """The output of the held tokens (U, H, d)."""
        if self.leaves is not None:
            return self.out_THd.detach()
        return rows.gather(self.out_THd).to(dtype)

    def storable(self) -> list[Tensor]:
        """The output and the denominators, which may be kept anywhere; none where a graph is kept."""
        return [self.out_THd, self.lse] if self.lse is not None else []


Take = Callable[[slice, slice, Tensor, Tensor, Tensor], None]
"""Takes query heads, key/value heads, and the gradients of these queries, keys and values (U, ..., d)."""


@torch.no_grad()
def attention_forward(q_UHd: Tensor, k_UGd: Tensor, v_UGd: Tensor, rows: Rows, form: AttentionForm) -> Attended:
    """Causal attention inside each row, never across; see `attend_rows`. No graph is made of the inputs."""
    q, k, v = rows.spread(q_UHd), rows.spread(k_UGd), rows.spread(v_UGd)
    way = _way(q, k, v, rows, form)
    if way == "graph":
        with torch.enable_grad():
            leaves = q_UHd.detach().requires_grad_(), k_UGd.detach().requires_grad_(), v_UGd.detach().requires_grad_()
            return Attended(way, attend_rows(*leaves, rows, form), None, leaves=leaves)
    if way == "cudnn":
        inputs = (_batched(x, rows) for x in (q, k, v))
        out, lse, *_, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            *inputs, None, True, 0.0, True, scale=form.scale
        )
        return Attended(way, _flat(out), lse, (seed, offset))
    if way == "flash":
        out, lse, seed, offset, _ = _aten._flash_attention_forward(
            q, k, v, *_bounds(rows), 0.0, form.window is None, False, scale=form.scale, **_window(form)
        )
        return Attended(way, out, lse, (seed, offset))
    outs, lses = [], []
    for start, end in _filled(rows):
        inputs = (x[start:end].transpose(0, 1)[None].float() for x in (q, k, v))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, True, scale=form.scale)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].t())
    return Attended(way, _joined(outs), _joined(lses))


@torch.no_grad()
def attention_backward(
    dmixed_UHd: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    attended: Attended,
    rows: Rows,
    form: AttentionForm,
    take: Take,
) -> None:
    """Gradients of queries, keys and values, handed to ``take`` some heads at a time.

    Args:
        dmixed_UHd: gradient of the output of the held tokens.
        qkv: the forward's queries (U, H, d), keys and values (U, G, d). Heads that ``take`` was given are not read
            again, so it may write over them.
        attended: what the forward returned.
        rows: the rows.
        form: the form of the scores.
        take: called with every head once.
    """
    heads, groups = qkv[0].shape[1], qkv[1].shape[1]
    if attended.leaves is not None:
        take(slice(heads), slice(groups), *torch.autograd.grad(attended.out_THd, attended.leaves, dmixed_UHd))
        return
    tokens, share = attended.out_THd.shape[0], heads // groups
    step = min(groups, max(1, TOKEN_HEADS // (tokens * share)))
    for start in range(0, groups, step):
        end = min(start + step, groups)
        queries, keys = slice(start * share, end * share), slice(start, end)
        inputs = [x[:, part] for x, part in zip((dmixed_UHd, *qkv), (queries, queries, keys, keys))]
        if step < groups:
            # Dense, as backends would lay them out themselves: some take one layout for the other.
            inputs = [x.contiguous() for x in inputs]
        take(queries, keys, *_some_heads(inputs, attended, queries, rows, form))


def _some_heads(
    inputs: list[Tensor], attended: Attended, heads: slice, rows: Rows, form: AttentionForm
) -> list[Tensor]:
    """Gradients of these heads' queries, keys and values, from those of their outputs and from themselves."""
    held, out_THd, lse = inputs[0].shape[0], attended.out_THd, attended.lse
    assert lse is not None
    if inputs[0].shape[1] < out_THd.shape[1]:
        out_THd = out_THd[:, heads].contiguous()
        # A copy in the order of the original's dimensions, whichever that is.
        lse = (lse[heads] if attended.way == "flash" else lse[:, heads]).clone()
    dout_THd = rows.gather_backward(inputs[0], out_THd.shape[0])
    q, k, v = (rows.spread(x) for x in inputs[1:])
    if attended.way == "cudnn":
        dout, q, k, v, out = (_batched(x, rows) for x in (dout_THd, q, k, v, out_THd))
        length = q.shape[2]
        gradients = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, *attended.seeds, None, None, None, length, length, 0.0, True, scale=form.scale
        )
        gradients = [_flat(x) for x in gradients]
    elif attended.way == "flash":
        gradients = _aten._flash_attention_backward(
            dout_THd, q, k, v, out_THd, lse, *_bounds(rows), 0.0, form.window is None, *attended.seeds,
            scale=form.scale, **_window(form),
        )  # fmt: skip
    else:
        gradients = _row_by_row((dout_THd, q, k, v, out_THd), lse, rows, form)
    return [rows.spread_backward(x, held) for x in gradients]


def _row_by_row(inputs: tuple[Tensor, ...], lse_TH: Tensor, rows: Rows, form: AttentionForm) -> list[Tensor]:
    parts = []
    for start, end in _filled(rows):
        row = (x[start:end].transpose(0, 1)[None].float() for x in inputs)
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *row, lse_TH[start:end].t()[None], 0.0, True, scale=form.scale
        )
        parts.append([x[0].transpose(0, 1).to(inputs[1].dtype) for x in gradients])
    return [_joined(list(x)) for x in zip(*parts)]


def _way(q: Tensor, k: Tensor, v: Tensor, rows: Rows, form: AttentionForm) -> Way:
    """How these whole rows are attended."""
    windowed = form.window is not None and form.window < rows.longest
    if form.softcap is not None:
        return "graph"
    if q.device.type == "cpu":
        return "graph" if windowed or not rows.longest else "cpu"
    # Larger heads have rules of their own in every backend and on every card; torch's choice among them is left alone.
    if not varlen_serves(q.device, q.dtype) or q.shape[2] % 8 or q.shape[2] > 128:
        return "graph"
    if not rows.alike or form.window is not None:
        return "flash"
    params: Any = torch.backends.cuda.SDPAParams  # typed without the last argument
    seen = params(*(_batched(x, rows) for x in (q, k, v)), None, 0.0, True, True)
    return "cudnn" if torch.backends.cuda.can_use_cudnn_attention(seen) else "flash"


def _batched(x_THd: Tensor, rows: Rows) -> Tensor:
    """Rows of one length, (T, H, d) to (B, H, S, d), without a copy."""
    batched: Tensor = x_THd.unflatten(0, (len(rows.starts) - 1, -1))
    return batched.transpose(1, 2)


def _flat(x_BHSd: Tensor) -> Tensor:
    """And back."""
    return x_BHSd.transpose(1, 2).flatten(0, 1)


def _bounds(rows: Rows) -> tuple[Tensor, Tensor, int, int]:
    cu = rows.cu_seqlens()
    return cu, cu, rows.longest, rows.longest


def _window(form: AttentionForm) -> dict[str, int]:
    return {"window_size_left": -1 if form.window is None else form.window - 1, "window_size_right": 0}


def _filled(rows: Rows) -> list[tuple[int, int]]:
    """Rows that have tokens."""
    return [(start, end) for start, end in rows.spans() if start < end]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
