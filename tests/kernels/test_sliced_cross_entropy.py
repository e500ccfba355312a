"""``kernels.sliced_cross_entropy``: loss and gradient against the reference's, whatever the slices and the chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.kernels import sliced_cross_entropy as module
from jebi.kernels.linear_cross_entropy import PLAIN, LossForm, linear_cross_entropy, linear_cross_entropy_reference
from jebi.kernels.sliced_cross_entropy import chunk_tokens, sliced_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TOKENS, WIDTH, VOCABULARY = 37, 33, 301
DTYPES = (torch.float32, torch.bfloat16)
FORMS = (PLAIN, LossForm(label_smoothing=0.1), LossForm(softcap=1.5), LossForm(0.1, 1.5))
DRAWS = 12  # losses are single numbers, so their errors are compared over several draws


@dataclass
class Cut:
    """Slices of a dense head; each is spoilt once the next is asked for, as a buffer that is used again."""

    weight: Tensor
    most: int

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        for part in self.weight.split(self.most):
            lent = part.clone()
            yield lent
            lent.fill_(torch.nan)


def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels; logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * WIDTH**-0.5).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, form: LossForm) -> Tensor:
    logits = hidden.double() @ weight.double().t()
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=form.label_smoothing)


@pytest.mark.parametrize("most", [1, 64, 150, 301])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_against_the_reference(
    at_most_twice, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: LossForm, most: int
) -> None:
    """In chunks of 16 tokens."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    losses, grads = [], []
    for seed in range(DRAWS if most > 1 else 2):
        hidden, weight, labels = inputs(seed, dtype)
        leaves = [hidden.to(kind, copy=True).requires_grad_() for kind in (dtype, dtype, torch.float64)]
        results = (
            sliced_cross_entropy(leaves[0], Cut(weight, most), labels, form),
            linear_cross_entropy_reference(leaves[1], weight, labels, form),
            exact(leaves[2], weight, labels, form),
        )
        assert results[0].dtype == torch.float32
        for result in results:
            (result / TOKENS).backward()
        losses.append([result.detach() for result in results])
        grads.append([leaf.grad for leaf in leaves])
    for name, values in (("loss", losses), ("dhidden", grads)):
        at_most_twice(name, *(torch.stack(column) for column in zip(*values)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_token_that_is_learnt_well(at_most_twice, dtype: torch.dtype) -> None:
    """It is the small difference of the label's row and the mean of rows, of which it must keep its digits."""
    results = []
    _, weight, _ = inputs(0, dtype)
    hidden = (weight[:TOKENS].double() * 15).to(dtype)  # label n is row n
    labels = torch.arange(TOKENS)
    for kind in (dtype, dtype, torch.float64):
        leaf = hidden.to(kind, copy=True).requires_grad_()
        if len(results) == 0:
            loss = sliced_cross_entropy(leaf, Cut(weight, 50), labels)
        elif len(results) == 1:
            loss = linear_cross_entropy_reference(leaf, weight, labels)
        else:
            loss = exact(leaf, weight, labels, PLAIN)
            assert loss < 0.05 * TOKENS
        loss.backward()
        results.append(leaf.grad)
    # Token by token, since the gradients' sizes differ by orders of magnitude.
    for token in range(TOKENS):
        at_most_twice(f"token {token}", *(grad[token] for grad in results))


def test_equal_to_the_dense_form_but_for_the_order_of_sums() -> None:
    hidden, weight, labels = inputs(0, torch.float32)
    counts = (torch.arange(TOKENS) % 4).float()
    sliced, dense = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    one = sliced_cross_entropy(sliced, Cut(weight, 64), labels, LossForm(0.1), counts)
    other = linear_cross_entropy(dense, weight, labels, LossForm(0.1), counts)
    one.backward()
    other.backward()
    # Sums of the same float32 numbers in another order.
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(sliced.grad, dense.grad, rtol=1e-5, atol=1e-6)


def test_hidden_states_that_need_no_gradient() -> None:
    hidden, weight, labels = inputs(0, torch.float32)
    loss = sliced_cross_entropy(hidden, Cut(weight, 64), labels)
    assert not loss.requires_grad
    assert torch.equal(loss, sliced_cross_entropy(hidden.clone().requires_grad_(), Cut(weight, 64), labels).detach())


def test_no_labels_at_all() -> None:
    hidden, weight, labels = inputs(0, torch.float32)
    hidden = hidden[:0].requires_grad_()
    loss = sliced_cross_entropy(hidden, Cut(weight, 64), labels[:0])
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, WIDTH)


def test_loss_scale_above_float16_leaves_gradients_finite() -> None:
    hidden, weight, labels = inputs(0, torch.float16)
    weight *= 2.0**-6
    scale = 2.0**17  # as Trainer's scaler may use: no float16 itself, though the scaled gradients are
    fine = hidden.double().requires_grad_()
    (exact(fine, weight, labels, PLAIN) * scale).backward()
    hidden.requires_grad_()
    (sliced_cross_entropy(hidden, Cut(weight, 64), labels) * scale).backward()
    # A handful of roundings to float16 (2**-11 each): logits, shares, the products, the scaling.
    torch.testing.assert_close(hidden.grad.double(), fine.grad, rtol=0, atol=4 * 2**-11 * fine.grad.abs().max().item())


def test_chunks_hold_what_the_bytes_allow() -> None:
    llama = Cut(torch.empty(128_256, 1, device="meta"), 4096)
    assert chunk_tokens(llama, 4096, 2, on_card=True) == 2 * module.CHUNK_BYTES // (4096 * 2 + 4096 * 8) == 3276
    assert chunk_tokens(llama, 10**9, 2, on_card=True) == 512
    assert chunk_tokens(llama, 10**9, 4, on_card=False) == 16


def test_tokens_learnt_well_keep_their_gradients_in_float16() -> None:
    """Losses of 2e-5 and more, as for the head in one piece: most slopes are below float16's smallest number."""
    hidden, weight, labels = inputs(0, torch.float16)
    hidden += 19 * weight[labels] / weight[labels].float().square().sum(1, keepdim=True).half()
    fine = hidden.double().requires_grad_()
    exact(fine, weight, labels, PLAIN).mul(64).backward()
    ours = hidden.clone().requires_grad_()
    sliced_cross_entropy(ours, Cut(weight, 64), labels).mul(64).backward()
    # Logits of 19 are rounded by up to 2**-7, which is 1 % of a loss; the least slopes have 8 bits left.
    error_N = (ours.grad.double() - fine.grad).norm(dim=1) / fine.grad.norm(dim=1)
    assert error_N.max() < 0.04
