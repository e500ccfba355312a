"""The gated linear unit: forward, and a backward that reuses all three of its inputs' memory.

An adapter's share of gate, up and the incoming gradient is a product of two thin matrices; it is added here, where
these are read anyway, instead of in a pass over memory of its own (4,096 tokens of a Llama 8B layer on an H100: 0.25 ms
for gate and up beside 1.2 of their product). The backward also makes the adapters' gradients that are sums over the
tokens of what it writes. A program owns a few columns, whose thin parts and sums stay in registers, and walks over a
stretch of tokens.

Shapes: T tokens, F feed-forward width, R ranks, S stretches. Rows may be strided; values within a row are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.glu import Thin
from jebi.kernels.gpu.launch import launch
from jebi.kernels.low_rank import LowRank, summed

_COLUMNS, _WARPS = 128, 4
_FORWARD_TOKENS, _BACKWARD_TOKENS = 16, 32
_STRETCH = 512
"""Tokens that one program walks over. With these, the best of fifteen settings tried on an H100, 8,192 tokens and F =
14,336 take 0.27 ms forward and 0.69 backward with rank 16 and its sums (0.25 and 0.50 without thin products)."""
_SUMMED_RANK = 32
"""Sums of adapters of a higher rank do not fit the registers, and none the shared memory of cards before 8.0."""
_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def forward(gate_TF: Tensor, up_TF: Tensor, activation: str, out_TF: Tensor, thin: Thin, scale: float = 1.0) -> None:
    """Write ``scale * act(gate) * up`` into ``out_TF``."""
    tokens, width = gate_TF.shape
    gate_thin, gate_rank = _thin(thin[0], gate_TF)
    up_thin, up_rank = _thin(thin[1], gate_TF)
    launch(
        _forward, _grid(tokens, width),
        gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0), out_TF.stride(0), tokens, width, scale,
        *gate_thin, *up_thin,
        KIND=_KINDS[activation], GATE_RANK=gate_rank, UP_RANK=up_rank,
        TOKENS=_FORWARD_TOKENS, COLUMNS=_COLUMNS, STRETCH=_STRETCH, num_warps=_WARPS,
    )  # fmt: skip


def backward_(
    da_TF: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    activation: str,
    thin: Thin,
    da_thin: LowRank | None,
    wants_act: bool,
    scale: float = 1.0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Put the gate's gradient into ``gate_TF``, up's into ``up_TF``, and the product into ``da_TF`` if wanted.

    Returns for gate, up and the product `summed` of it and the thin product it came with.
    """
    tokens, width = gate_TF.shape
    shares, most = (*thin, da_thin), _summed_rank(gate_TF.device)
    arguments, ranks, stretches = [], [], []
    for share in shares:
        matrices, rank = _thin(share, gate_TF)
        shape = (triton.cdiv(tokens, _STRETCH), rank, width) if 0 < rank <= most else (0,)
        stretches.append(torch.empty(shape, dtype=torch.float32, device=gate_TF.device))
        arguments += [*matrices, stretches[-1]]
        ranks.append(rank)
    launch(
        _backward, _grid(tokens, width),
        da_TF, gate_TF, up_TF, da_TF.stride(0), gate_TF.stride(0), up_TF.stride(0), tokens, width, scale, *arguments,
        KIND=_KINDS[activation], GATE_RANK=ranks[0], UP_RANK=ranks[1], DA_RANK=ranks[2],
        KEEP_ACT=wants_act or ranks[2] > most, SUMMED_RANK=most,
        TOKENS=_BACKWARD_TOKENS, COLUMNS=_COLUMNS, STRETCH=_STRETCH, num_warps=_WARPS,
    )  # fmt: skip
    gate_sum, up_sum, act_sum = (
        part.sum(0)[: share.left_TR.shape[1]] if share is not None and part.numel() else summed(share, x_TF)
        for share, part, x_TF in zip(shares, stretches, (gate_TF, up_TF, da_TF))
    )
    return gate_sum, up_sum, act_sum


def _summed_rank(device: torch.device) -> int:
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return 0 if old else _SUMMED_RANK


def _grid(tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(width, _COLUMNS), triton.cdiv(tokens, _STRETCH)


def _thin(thin: LowRank | None, like: Tensor) -> tuple[tuple[Tensor, Tensor, int, int, int, int], int]:
    """A product's matrices, their strides and its rank as a kernel takes them; rank 0 where there is none."""
    if thin is None:
        return (like, like, 0, 0, 0, 0), 0
    left_TR, right_RF = thin.left_TR, thin.right_RF
    rank = left_TR.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    return (left_TR, right_RF, left_TR.stride(0), right_RF.stride(0), right_RF.stride(1), rank), padded


@triton.jit
def _left(ptr, stride, rank, row, tokens, RANK: tl.constexpr):
    """Rows of a thin product's left matrix; zeros beyond the last token."""
    index = tl.arange(0, RANK)[None]
    return tl.load(ptr + row[:, None] * stride + index, (row[:, None] < tokens) & (index < rank), other=0.0)


@triton.jit
def _right(ptr, row_stride, column_stride, rank, column, width, RANK: tl.constexpr):
    """Columns of its right matrix."""
    index = tl.arange(0, RANK)[:, None]
    return tl.load(
        ptr + index * row_stride + column[None] * column_stride, (index < rank) & (column < width)[None], other=0.0
    )


@triton.jit
def _store_sum(ptr, total, column, width, RANK: tl.constexpr):
    """One stretch's sum, (R, F) of its own."""
    place = (tl.program_id(1).to(tl.int64) * RANK + tl.arange(0, RANK)[:, None]) * width + column[None]
    tl.store(ptr + place, tl.trans(total), (column < width)[None] & (tl.arange(0, RANK)[:, None] < RANK))


@triton.jit
def _activated(gate, KIND: tl.constexpr):
    """The activation and its slope."""
    if KIND == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        act = gate * sigmoid
        slope = sigmoid + act * (1.0 - sigmoid)
    elif KIND == 1:
        # (1 + tanh(x)) / 2 is the logistic function of 2 x, which loses no digits near zero and overflows nowhere.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        sigmoid = 1.0 / (1.0 + tl.exp(-inner))
        act = gate * sigmoid
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        slope = sigmoid + act * inner_slope / (1.0 + tl.exp(inner))
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        act = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    return act, slope


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, out_stride, tokens, width, scale,
    gate_left, gate_right, gate_left_stride, gate_right_row, gate_right_column, gate_rank,
    up_left, up_right, up_left_stride, up_right_row, up_right_column, up_rank,
    KIND: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * STRETCH
    if GATE_RANK > 0:
        gate_columns = _right(gate_right, gate_right_row, gate_right_column, gate_rank, column, width, GATE_RANK)
    if UP_RANK > 0:
        up_columns = _right(up_right, up_right_row, up_right_column, up_rank, column, width, UP_RANK)
    for start in range(first, tl.minimum(first + STRETCH, tokens), TOKENS):
        row = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None]
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column, inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + row[:, None] * up_stride + column, inside, other=0.0).to(tl.float32)
        # In full float32 where the values are: the matrix units' own mode for it would cost three digits.
        if GATE_RANK > 0:
            left = _left(gate_left, gate_left_stride, gate_rank, row, tokens, GATE_RANK)
            gate = tl.dot(left, gate_columns, gate, input_precision="ieee")
        if UP_RANK > 0:
            left = _left(up_left, up_left_stride, up_rank, row, tokens, UP_RANK)
            up = tl.dot(left, up_columns, up, input_precision="ieee")
        act, _ = _activated(gate, KIND)
        # Rounded after the activation, as transformers rounds.
        act = act.to(out_ptr.dtype.element_ty).to(tl.float32) * scale
        tl.store(out_ptr + row[:, None] * out_stride + column, (act * up).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    da_ptr, gate_ptr, up_ptr, da_stride, gate_stride, up_stride, tokens, width, scale,
    gate_left, gate_right, gate_left_stride, gate_right_row, gate_right_column, gate_rank, gate_sum_ptr,
    up_left, up_right, up_left_stride, up_right_row, up_right_column, up_rank, up_sum_ptr,
    da_left, da_right, da_left_stride, da_right_row, da_right_column, da_rank, da_sum_ptr,
    KIND: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr, DA_RANK: tl.constexpr, KEEP_ACT: tl.constexpr,
    SUMMED_RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    dtype = da_ptr.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * STRETCH
    if GATE_RANK > 0:
        gate_columns = _right(gate_right, gate_right_row, gate_right_column, gate_rank, column, width, GATE_RANK)
        if GATE_RANK <= SUMMED_RANK:
            gate_sum = tl.zeros((COLUMNS, GATE_RANK), tl.float32)
    if UP_RANK > 0:
        up_columns = _right(up_right, up_right_row, up_right_column, up_rank, column, width, UP_RANK)
        if UP_RANK <= SUMMED_RANK:
            up_sum = tl.zeros((COLUMNS, UP_RANK), tl.float32)
    if DA_RANK > 0:
        da_columns = _right(da_right, da_right_row, da_right_column, da_rank, column, width, DA_RANK)
        if DA_RANK <= SUMMED_RANK:
            da_sum = tl.zeros((COLUMNS, DA_RANK), tl.float32)
    for start in range(first, tl.minimum(first + STRETCH, tokens), TOKENS):
        row = (start + tl.arange(0, TOKENS)).to(tl.int64)
        inside = (row < tokens)[:, None] & (column < width)[None]
        da_place = da_ptr + row[:, None] * da_stride + column
        gate_place = gate_ptr + row[:, None] * gate_stride + column
        up_place = up_ptr + row[:, None] * up_stride + column
        da = tl.load(da_place, inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_place, inside, other=0.0).to(tl.float32)
        up = tl.load(up_place, inside, other=0.0).to(tl.float32)
        if GATE_RANK > 0:
            gate_rows = _left(gate_left, gate_left_stride, gate_rank, row, tokens, GATE_RANK)
            gate = tl.dot(gate_rows, gate_columns, gate, input_precision="ieee")
        if UP_RANK > 0:
            up_rows = _left(up_left, up_left_stride, up_rank, row, tokens, UP_RANK)
            up = tl.dot(up_rows, up_columns, up, input_precision="ieee")
        if DA_RANK > 0:
            da_rows = _left(da_left, da_left_stride, da_rank, row, tokens, DA_RANK)
            da = tl.dot(da_rows, da_columns, da, input_precision="ieee")
        act, slope = _activated(gate, KIND)
        rounded = act.to(dtype).to(tl.float32) * scale
        dgate = (da * scale * up * slope).to(dtype)
        dup = (da * rounded).to(dtype)
        product = (rounded * up).to(dtype)
        tl.store(gate_place, dgate, inside)
        tl.store(up_place, dup, inside)
        if KEEP_ACT:
            tl.store(da_place, product, inside)
        # What lies outside is zero: of the gate's and up's gradients since da is, of the product since up is.
        if (GATE_RANK > 0) & (GATE_RANK <= SUMMED_RANK):
            gate_sum = tl.dot(tl.trans(dgate), gate_rows, gate_sum, input_precision="ieee")
        if (UP_RANK > 0) & (UP_RANK <= SUMMED_RANK):
            up_sum = tl.dot(tl.trans(dup), up_rows, up_sum, input_precision="ieee")
        if (DA_RANK > 0) & (DA_RANK <= SUMMED_RANK):
            da_sum = tl.dot(tl.trans(product), da_rows, da_sum, input_precision="ieee")
    if (GATE_RANK > 0) & (GATE_RANK <= SUMMED_RANK):
        _store_sum(gate_sum_ptr, gate_sum, column, width, GATE_RANK)
    if (UP_RANK > 0) & (UP_RANK <= SUMMED_RANK):
        _store_sum(up_sum_ptr, up_sum, column, width, UP_RANK)
    if (DA_RANK > 0) & (DA_RANK <= SUMMED_RANK):
        _store_sum(da_sum_ptr, da_sum, column, width, DA_RANK)
