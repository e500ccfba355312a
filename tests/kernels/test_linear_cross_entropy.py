"""``kernels.linear_cross_entropy``: the reference against float64, chunked loss and gradient against its autograd."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.config import limits
from jebi.kernels import linear_cross_entropy as module
from jebi.kernels.linear_cross_entropy import (
    PLAIN,
    LossForm,
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOKENS, WIDTH, VOCABULARY = 37, 33, 301  # with the smallest chunk of 16: two whole ones and a short one
DTYPES = (torch.float32, torch.bfloat16)
FORMS = (PLAIN, LossForm(label_smoothing=0.1), LossForm(softcap=1.5), LossForm(0.1, 1.5))
DRAWS = 12  # losses are single numbers, so their errors are compared over several draws


def inputs(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * WIDTH**-0.5).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (tokens,), generator=generator)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, form: LossForm) -> Tensor:
    return plain(hidden.double(), weight.double(), labels, form)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, form: LossForm) -> Tensor:
    """What a model without a head of its own computes: its logits rounded to its dtype."""
    logits = hidden @ weight.t()
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=form.label_smoothing)


def test_a_chunks_logits_are_gone_before_the_next_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    chunk_, seen = module._chunk_, []

    def watched(logits: Tensor, *others: Any) -> Any:
        assert not any(made() is not None for made in seen)
        loss, slopes = chunk_(logits, *others)
        seen.extend(map(weakref.ref, (logits, slopes)))
        return loss, slopes

    monkeypatch.setattr(module, "_chunk_", watched)
    hidden, weight, labels = inputs(0, torch.float32)
    linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert len(seen) == 2 * 3


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_BYTES", 1)
    assert chunk_tokens(VOCABULARY) == 16


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_float64(at_most_twice, dtype: torch.dtype, form: LossForm) -> None:
    losses = []
    for seed in range(DRAWS):
        hidden, weight, labels = inputs(seed, dtype)
        ours = linear_cross_entropy_reference(hidden, weight, labels, form)
        losses.append((ours, plain(hidden, weight, labels, form), exact(hidden, weight, labels, form)))
    at_most_twice("loss", *(torch.stack(values) for values in zip(*losses)))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_against_the_reference(
    at_most_twice, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: LossForm, chunked: bool
) -> None:
    """The hidden states' gradient and a trained head's."""
    if chunked:
        small_chunks(monkeypatch)
    losses, grads, heads = [], [], []
    for seed in range(DRAWS):
        hidden, weight, labels = inputs(seed, dtype)
        leaves = [
            [value.to(kind, copy=True).requires_grad_() for value in (hidden, weight)]
            for kind in (dtype, dtype, torch.float64)
        ]
        results = (
            linear_cross_entropy(*leaves[0], labels, form),
            linear_cross_entropy_reference(*leaves[1], labels, form),
            exact(*leaves[2], labels, form),
        )
        assert results[0].dtype == torch.float32
        for result in results:
            (result / TOKENS).backward()
        losses.append([result.detach() for result in results])
        grads.append([leaf[0].grad for leaf in leaves])
        heads.append([leaf[1].grad for leaf in leaves])
    for name, values in (("loss", losses), ("dhidden", grads), ("dweight", heads)):
        at_most_twice(name, *(torch.stack(column) for column in zip(*values)))


def test_a_trained_head_of_another_dtype() -> None:
    """A float32 master is used in the hidden states' dtype, and gets its gradient in its own."""
    hidden, weight, labels = inputs(0, torch.bfloat16)
    master, rounded = weight.float().requires_grad_(), weight.clone().requires_grad_()
    results = [linear_cross_entropy(hidden, head, labels) for head in (master, rounded)]
    for result in results:
        result.backward()
    assert torch.equal(*results)
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad.bfloat16(), rounded.grad)


def test_chunks_hold_what_the_bytes_allow() -> None:
    assert chunk_tokens(128_256) == limits.CHUNK_BYTES // (4 * 128_256) == 130
    assert chunk_tokens(49_152) == 341
    assert chunk_tokens(10**9) == 16


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
def test_number_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    hidden, weight, labels = inputs(0, torch.float32, tokens)
    whole = linear_cross_entropy(hidden, weight, labels)
    small_chunks(monkeypatch)
    # Only the order of the sum and the products' blocking differ: a few roundings of float32.
    assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("chunked", [False, True])
def test_no_labels_at_all(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    if chunked:
        small_chunks(monkeypatch)
    hidden, weight, labels = inputs(0, torch.float32, tokens=0)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, WIDTH)


def test_hidden_states_that_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(0, torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden.clone().requires_grad_(), weight, labels).detach())
    monkeypatch.setattr(module, "_loss_grad_", None)  # whose work would be for nothing
    linear_cross_entropy(hidden, weight, labels)


def test_loss_scale_above_float16_leaves_gradients_finite() -> None:
    hidden, weight, labels = inputs(0, torch.float16)
    weight *= 2.0**-6
    scale = 2.0**17  # as Trainer's scaler may use: no float16 itself, though the scaled gradients are
    fine = hidden.double().requires_grad_()
    (exact(fine, weight, labels, PLAIN) * scale).backward()
    hidden.requires_grad_()
    (linear_cross_entropy(hidden, weight, labels) * scale).backward()
    # A handful of roundings to float16 (2**-11 each): logits, their gradient, the product, the scaling.
    torch.testing.assert_close(hidden.grad.double(), fine.grad, rtol=0, atol=4 * 2**-11 * fine.grad.abs().max().item())


@pytest.mark.parametrize("counted", [False, True])
def test_tokens_learnt_well_keep_their_gradients_in_float16(counted: bool) -> None:
    """Losses of 2e-5 to 3e-2: without `LIFT` most slopes are below float16's smallest number and whole rows are lost.
    Counts of up to 1,081 would overflow it."""
    hidden, weight, labels = inputs(0, torch.float16)
    weight *= 0.1
    hidden += 19 * weight[labels] / weight[labels].float().square().sum(1, keepdim=True).half()
    counts = 1 + torch.arange(TOKENS) * 30.0
    counts = counts if counted else torch.ones(TOKENS)
    fine = [x.double().requires_grad_() for x in (hidden, weight)]
    (F.cross_entropy(fine[0] @ fine[1].t(), labels, reduction="none") * counts).sum().mul(64).backward()
    ours = [x.clone().requires_grad_() for x in (hidden, weight.float())]
    linear_cross_entropy(*ours, labels, counts_N=counts if counted else None).mul(64).backward()
    for mine, exactly in zip(ours, fine):
        # Logits of 19 are rounded by up to 2**-7, which is 1 % of a loss; the least slopes, 1e-7, have 8 bits left.
        error_N = (mine.grad.double() - exactly.grad).norm(dim=1) / exactly.grad.norm(dim=1)
        assert error_N.max() < 0.04


def test_inputs_are_left_alone() -> None:
    before, after = inputs(0, torch.float32), inputs(0, torch.float32)
    linear_cross_entropy(after[0].requires_grad_(), *after[1:]).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("chunked", [False, True])
def test_labels_of_some_of_the_tokens(monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    """As if these had been gathered before; one that comes twice adds up, one that does not has no gradient."""
    if chunked:
        small_chunks(monkeypatch)
    hidden, weight, labels = inputs(0, torch.float32)
    index = torch.arange(0, TOKENS, 2).repeat_interleave(2)[: len(labels)]
    inside, before = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    results = (
        linear_cross_entropy(*inside, labels, index_N=index) / TOKENS,
        linear_cross_entropy(before[0].index_select(0, index), before[1], labels) / TOKENS,
    )
    for result in results:
        result.backward()
    assert torch.equal(*results)
    # The same numbers; sums of two tokens are rounded before or after they are scaled.
    torch.testing.assert_close(inside[0].grad, before[0].grad, rtol=1e-6, atol=1e-8)
    assert torch.equal(inside[1].grad, before[1].grad)
    assert inside[0].grad[1::2].eq(0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_counted_token_is_one_that_stands_there_as_often(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    small_chunks(monkeypatch)
    hidden, weight, labels = inputs(0, torch.float32)
    counts = torch.arange(TOKENS) % 4
    once, often = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    counted = linear_cross_entropy(once, weight, labels, LossForm(smoothing), counts.float())
    repeated = linear_cross_entropy(
        often.repeat_interleave(counts, 0), weight, labels.repeat_interleave(counts), LossForm(smoothing)
    )
    counted.backward()
    repeated.backward()
    # Sums of the same float32 numbers in another order.
    torch.testing.assert_close(counted, repeated, rtol=1e-6, atol=0)
    torch.testing.assert_close(once.grad, often.grad, rtol=1e-5, atol=1e-6)
