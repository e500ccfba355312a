"""``nn.attention_pair`` against ``nn.attention.attend_rows`` under autograd."""

import pytest
import torch
from torch import Tensor

from jebi.nn import attention_pair
from jebi.nn.attention import attend_rows
from jebi.nn.attention_pair import attention_backward, attention_forward
from jebi.nn.rows import Rows, rows_from_lengths
from jebi.nn.shape import AttentionForm

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SIZE = 10
CPU = torch.device("cpu")
PLAIN = AttentionForm(SIZE**-0.5)
ROWS = rows_from_lengths([5, 1, 11], CPU)
# The same three rows when the second and third begin with one and four tokens of the first.
SHARED = Rows(
    starts=ROWS.starts,
    positions_U=torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
    whole_T=torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]),
    first_U=torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16]),
)
# As a pass that is padded to a shape has them: rows of no tokens behind.
PADDED = Rows((0, 11, 22, 33, 44), ROWS.positions_U, cu=torch.tensor([0, 5, 6, 17, 17], dtype=torch.int32))


def inputs(rows: Rows, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows.positions_U.shape[0], n, SIZE) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def by_pair(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, form: AttentionForm) -> list[Tensor]:
    """Output and gradients; what was handed over is spoilt at once, as its taker may do."""
    q, k, v = q.clone(), k.clone(), v.clone()
    attended = attention_forward(q, k, v, rows, form)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]

    def take(heads: slice, groups: slice, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        for whole, own, part, piece in zip(gradients, (q, k, v), (heads, groups, groups), (dq, dk, dv), strict=True):
            assert whole[:, part].isnan().all(), "every head once"
            whole[:, part] = piece
            own[:, part] = torch.nan

    out = attended.mixed(rows, q.dtype).clone()
    attention_backward(dout, (q, k, v), attended, rows, form, take)
    return [out, *gradients]


@pytest.mark.parametrize(
    "rows", [ROWS, SHARED, PADDED, rows_from_lengths([7, 7], CPU)], ids=["plain", "shared", "padded", "alike"]
)
@pytest.mark.parametrize("form", [PLAIN, AttentionForm(0.2, window=11), AttentionForm(0.3, window=3)], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 2**19])
def test_the_same_as_under_autograd(
    monkeypatch: pytest.MonkeyPatch, rows: Rows, form: AttentionForm, heads: int, groups: int, dtype: torch.dtype,
    at_once: int,
) -> None:  # fmt: skip
    """To a rounding: on a CPU the same calls are made, whose float32 sums depend on strides and alignment."""
    monkeypatch.setattr(attention_pair, "TOKEN_HEADS", at_once)
    *qkv, dout = inputs(rows, heads, groups, dtype)
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = attend_rows(*leaves, rows, form)
    ours = by_pair(*qkv, dout, rows, form)
    for value, other in zip(ours, [expected, *torch.autograd.grad(expected, leaves, dout)], strict=True):
        assert value.dtype == dtype
        # Values of order 1 and sums of at most 44 of them in float32; in 16 bits a sum may round to the other side.
        torch.testing.assert_close(value, other, atol=44 * 2**-24, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", [AttentionForm(0.5, softcap=2.0), AttentionForm(0.3, window=3)], ids=str)
def test_what_needs_a_graph_keeps_one(form: AttentionForm) -> None:
    *qkv, _ = inputs(ROWS, 6, 2, torch.float32)
    attended = attention_forward(*qkv, ROWS, form)
    assert attended.way == "graph"
    assert attended.lse is None
    assert torch.equal(attended.mixed(ROWS, torch.float32), attend_rows(*qkv, ROWS, form))


def test_no_graph_of_the_inputs_is_made() -> None:
    *qkv, _ = inputs(ROWS, 6, 2, torch.float32)
    attended = attention_forward(*(x.requires_grad_() for x in qkv), ROWS, PLAIN)
    assert attended.way == "cpu"
    assert not attended.mixed(ROWS, torch.float32).requires_grad


@pytest.mark.parametrize("way", ["cudnn", "flash"])
@pytest.mark.parametrize("at_once", [1, 2**19])
def test_what_a_card_is_asked_fits_the_operators(monkeypatch: pytest.MonkeyPatch, way: str, at_once: int) -> None:
    """By their shapes alone; the numbers are `tests/nn/attention_on_card.py`'s."""
    monkeypatch.setattr(attention_pair, "_way", lambda *_: way)
    monkeypatch.setattr(attention_pair, "TOKEN_HEADS", at_once)
    rows = rows_from_lengths([32, 32], torch.device("meta"))
    whole = torch.empty(64, 12 * 16, dtype=torch.bfloat16, device="meta")
    q, k, v = (x.unflatten(1, (-1, 16)) for x in whole.split([128, 32, 32], dim=1))
    attended = attention_forward(q, k, v, rows, PLAIN)
    assert attended.out_THd.shape == q.shape
    assert [x.dtype for x in attended.storable()] == [torch.bfloat16, torch.float32]
    taken = []

    def take(heads: slice, groups: slice, *gradients: Tensor) -> None:
        taken.append(heads)
        assert [x.shape for x in gradients] == [q[:, heads].shape, k[:, groups].shape, v[:, groups].shape]
        assert all(x.is_contiguous() for x in gradients)

    attention_backward(torch.empty(q.shape, dtype=q.dtype, device="meta"), (q, k, v), attended, rows, PLAIN, take)
    assert taken == ([slice(0, 8)] if at_once > 1 else [slice(0, 4), slice(4, 8)])
