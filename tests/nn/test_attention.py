"""``nn.attention``: flat rows against each row alone and float64; new tokens over a cache against the whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.nn import attention
from jebi.nn.attention import attend_cached, attend_rows
from jebi.nn.rows import Rows, rows_from_lengths
from jebi.nn.shape import AttentionForm

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HEADS, GROUPS, SIZE = 6, 2, 10
CPU = torch.device("cpu")
PLAIN = AttentionForm(SIZE**-0.5)
FORMS = (
    PLAIN,
    AttentionForm(0.2),
    AttentionForm(0.3, window=3),
    AttentionForm(0.3, window=2),
    AttentionForm(0.3, window=40),
    AttentionForm(0.5, softcap=2.0),
    AttentionForm(0.5, window=6, softcap=2.0),
)


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(tokens, n, SIZE, generator=generator).to(dtype) for n in (HEADS, GROUPS, GROUPS))
    return q, k, v


def naive(q: Tensor, k: Tensor, v: Tensor, rows: Rows, form: AttentionForm) -> Tensor:
    """All rows at once under a block-diagonal mask, in the inputs' dtype."""
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    number = torch.cat([torch.full((end - start,), n) for n, (start, end) in enumerate(rows.spans())])
    index = torch.arange(q.shape[0])
    seen = (number[:, None] == number[None]) & (index[:, None] >= index[None])
    if form.window is not None:
        seen &= index[:, None] - index[None] < form.window
    scores = torch.einsum("qhd,khd->hqk", q, k) * form.scale
    if form.softcap is not None:
        scores = form.softcap * (scores / form.softcap).tanh()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", [[1], [9], [1, 1, 1], [5, 1, 11]])
def test_each_row_is_as_if_alone(lengths: list[int]) -> None:
    rows = rows_from_lengths(lengths, CPU)
    q, k, v = inputs(sum(lengths))
    together = attend_rows(q, k, v, rows, PLAIN)
    for start, end in rows.spans():
        alone = attend_rows(q[start:end], k[start:end], v[start:end], rows_from_lengths([end - start], CPU), PLAIN)
        # To the bit: on a CPU the same call is made.
        assert torch.equal(together[start:end], alone)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_gradients_against_float64(
    at_most_twice, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: AttentionForm, block: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    rows = rows_from_lengths([5, 1, 11], CPU)
    values = inputs(17, dtype)
    results = []
    for attend, kind in ((attend_rows, dtype), (naive, dtype), (naive, torch.float64)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in values]
        out = attend(*leaves, rows, form)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(kind))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for name, ours, plain, exact in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        at_most_twice(name, ours, plain, exact)


def test_common_beginnings_held_once() -> None:
    """Two rows that share three tokens: what each of them sees is what it sees in a row of its own."""
    whole, first = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5]), torch.tensor([0, 1, 2, 3, 4, 8])
    shared = Rows((0, 5, 9), torch.tensor([0, 1, 2, 3, 4, 3]), whole, first)
    held = inputs(6)
    out = attend_rows(*held, shared, PLAIN)
    apart = attend_rows(*(x[whole] for x in held), rows_from_lengths([5, 4], CPU), PLAIN)
    assert torch.equal(out, apart[first])


def test_another_rows_tokens_have_no_influence() -> None:
    rows = rows_from_lengths([4, 6], CPU)
    q, k, v = inputs(10)
    before = attend_rows(q, k, v, rows, PLAIN)
    k[4:], v[4:] = 1e3, torch.nan
    assert torch.equal(attend_rows(q, k, v, rows, PLAIN)[:4], before[:4])


@pytest.mark.parametrize("past", [0, 1, 7])
def test_new_tokens_over_a_cache(past: int) -> None:
    q, k, v = (x[None] for x in inputs(11))
    whole = attend_rows(q[0], k[0], v[0], rows_from_lengths([11], CPU), PLAIN)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    index = torch.arange(11)
    mask = None if past == 0 else (index[None] <= index[past:, None])[None]
    # float32 sums of at most 11 terms of order 1, in another order.
    torch.testing.assert_close(
        attend_cached(q[:, past:], keys, values, mask, PLAIN)[0], whole[past:], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(attend_cached(q[:, -1:], keys, values, None, PLAIN)[0], whole[-1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("new", [1, 3, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", [PLAIN, AttentionForm(0.5, softcap=2.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_attention_against_float64(
    at_most_twice, dtype: torch.dtype, form: AttentionForm, batch: int, padded: bool, new: int
) -> None:
    length = 7
    generator = torch.Generator().manual_seed(new)
    q = torch.randn(batch, new, HEADS, SIZE, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, GROUPS, length, SIZE, generator=generator).to(dtype)
    index = torch.arange(length)
    mask = (index[None] <= index[length - new :, None])[None].repeat(batch, 1, 1)
    if padded:
        # A query in the padding sees itself, as the model arranges it.
        mask[-1] &= (index >= 2) | (index == index[length - new :, None])
    given = mask if padded or 1 < new < length else None

    def plain(kind: torch.dtype) -> Tensor:
        scores = torch.einsum("bshd,bhld->bhsl", q.to(kind), k.to(kind).repeat_interleave(3, dim=1)) * form.scale
        if form.softcap is not None:
            scores = form.softcap * (scores / form.softcap).tanh()
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhsl,bhld->bshd", weights, v.to(kind).repeat_interleave(3, dim=1))

    at_most_twice("out", attend_cached(q, k, v, given, form), plain(dtype), plain(torch.float64))


def test_a_chunk_over_an_older_cache_needs_a_mask() -> None:
    q, k, v = (x[None].transpose(1, 2) for x in inputs(5))
    with pytest.raises(AssertionError, match="mask"):
        attend_cached(q.transpose(1, 2)[:, 3:], k, v, None, PLAIN)


def test_padded_keys_have_no_influence() -> None:
    q, k, v = (x[None] for x in inputs(6))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    mask = torch.tensor([[[False, False, True, True, True, True]]])
    ours = attend_cached(q[:, -1:], keys, values, mask, PLAIN)
    shorter = F.scaled_dot_product_attention(
        q[:, -1:].transpose(1, 2), keys[:, :, 2:], values[:, :, 2:], enable_gqa=True
    ).transpose(1, 2)
    # As above.
    torch.testing.assert_close(ours, shorter, rtol=1e-5, atol=1e-6)


def test_keys_and_values_once_for_every_query_head() -> None:
    """What a card without grouped heads is given: the same product, and gradients summed over each group."""
    q, k, v = (x.transpose(0, 1)[None].requires_grad_() for x in inputs(9))
    grouped = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wide = (attention._for_every_query(x, HEADS) for x in (k, v))
    single = F.scaled_dot_product_attention(q, *wide, is_causal=True)
    # Roundings of float32.
    torch.testing.assert_close(single, grouped, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (single, grouped))):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
