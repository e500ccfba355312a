"""Cross-entropy of a linear head, in chunks of tokens: all the logits never exist at once.

Only tokens that have a label are multiplied. Gradients are computed in the forward, chunk by chunk, while the chunk's
logits are at hand: the hidden states' where they need one, the head's weight's where that is trained. A head that is
not dense, or not on the card, is `sliced_cross_entropy`'s.

Shapes: T tokens, N of them labelled, C tokens of a chunk, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.config.limits import chunk_tokens
from jebi.kernels.low_rank import product32

LIFT = 2.0**8
"""What gradients are multiplied by within, in float16, where a token counts most; undone in float32 before the loss's
own factor. A token that is learnt well has slopes below float16's smallest number, 6e-8, and they are rounded here
before the loss scale reaches them. With it logits' slopes stay below 256, and the hidden states' below 512 times the
head's largest weight."""


_SCALED_TOKENS = 8192
"""Tokens whose gradients are scaled at once."""


@dataclass(frozen=True)
class LossForm:
    """What is between the head's product and the loss."""

    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary."""
    softcap: float | None = None
    """Logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv:2408.00118, section 2)."""


PLAIN = LossForm()


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, form: LossForm = PLAIN
) -> Tensor:
    """Reference, differentiable: the summed loss with all logits (N, V) at once, the softmax in float32."""
    logits_NV = softcapped(F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).float(), form.softcap)
    return F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=form.label_smoothing)


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    form: LossForm = PLAIN,
    counts_N: Tensor | None = None,
    index_N: Tensor | None = None,
) -> Tensor:
    """Sum over the tokens of the cross-entropy of ``hidden @ weight.T``; float32 scalar.

    Args:
        hidden_TD: (T, D), float32, bfloat16 or float16.
        weight_VD: (V, D), cast to the hidden states' dtype; differentiable where it requires a gradient.
        labels_N: (N,) int64 in [0, V).
        form: label smoothing and softcapping.
        counts_N: (N,) float32, how often each token counts; once when None.
        index_N: (N,) int64, which tokens the labels are of; all, in order, when None. They are gathered chunk by chunk,
            since all of them together may be as large as the hidden states. A token that comes twice adds up.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_N, form, counts_N, index_N)
    return loss


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """The logits, capped smoothly where a cap is given; differentiable."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        form: LossForm,
        counts_N: Tensor | None,
        index_N: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        lift = None
        if needs_hidden or needs_weight:
            counts_N, lift = lifted(labels_N, counts_N, hidden_TD.dtype)
        w_VD = weight_VD.to(hidden_TD.dtype)
        grad_TD = None
        if needs_hidden:
            grad_TD = torch.empty_like(hidden_TD) if index_N is None else torch.zeros_like(hidden_TD)
        # In float32, since it is a sum over chunks.
        grad_VD = torch.zeros_like(w_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        step = chunk_tokens(w_VD.shape[0], hidden_TD.is_cuda)
        for start in range(0, labels_N.shape[0], step):
            part = slice(start, start + step)
            counts_C = counts_N[part] if counts_N is not None else None
            hidden_CD = hidden_TD[part] if index_N is None else hidden_TD.index_select(0, index_N[part])
            logits_CV = hidden_CD @ w_VD.t()
            loss, dlogits_CV = _chunk_(logits_CV, labels_N[part], counts_C, form, needs_hidden or needs_weight)
            total += loss
            if grad_TD is not None and index_N is None:
                torch.mm(dlogits_CV, w_VD, out=grad_TD[part])
            elif grad_TD is not None and index_N is not None:
                grad_TD.index_add_(0, index_N[part], dlogits_CV @ w_VD)
            if grad_VD is not None:
                grad_VD += product32(dlogits_CV.t(), hidden_CD)
            del logits_CV, dlogits_CV  # before the next chunk's are made
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(grad_TD, grad_VD, lift)
        return total if lift is None else total / lift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_TD, grad_VD, lift = ctx.saved_tensors
        factor = grads[0] if lift is None else grads[0] / lift
        scaled_TD = None if grad_TD is None else scaled(grad_TD, factor)
        scaled_VD = None if grad_VD is None else (grad_VD * factor).to(ctx.weight_dtype)
        return scaled_TD, scaled_VD, None, None, None, None


def lifted(labels_N: Tensor, counts_N: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """How often tokens count, and by what that was multiplied so that slopes keep their digits in float16."""
    if dtype != torch.float16 or not labels_N.shape[0]:
        return counts_N, None
    # A token that counts LIFT times has a loss and slopes LIFT times as large.
    counts_N = torch.ones_like(labels_N, dtype=torch.float32) if counts_N is None else counts_N
    lift = LIFT / counts_N.max().clamp(min=1 / LIFT)
    return counts_N * lift, lift


def scaled(grad_TD: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a factor, in its dtype.

    In float32 first: under loss scaling the factor alone may exceed what float16 holds. Some tokens at a time, since
    float32 for all takes twice the memory of the gradient.
    """
    scaled_TD = torch.empty_like(grad_TD)
    for part_TD, out_TD in zip(grad_TD.split(_SCALED_TOKENS), scaled_TD.split(_SCALED_TOKENS)):
        out_TD.copy_(part_TD.float() * factor)
    return scaled_TD


def _chunk_(
    logits_CV: Tensor, labels_C: Tensor, counts_C: Tensor | None, form: LossForm, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss and its gradient by the logits in their dtype, which may be written over them."""
    if logits_CV.is_cuda:
        from jebi.kernels.gpu import cross_entropy as gpu

        losses_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
        settings = form.label_smoothing, form.softcap, wants_grad
        gpu.loss_and_grad_(logits_CV, labels_C, counts_C, losses_C, settings)
        return losses_C.sum(), logits_CV
    dtype = logits_CV.dtype
    logits_CV = logits_CV.float()
    slope_CV = cap_(logits_CV, form.softcap) if form.softcap is not None else None
    losses_C = _token_losses_(logits_CV, labels_C, form.label_smoothing)
    loss = losses_C.sum() if counts_C is None else losses_C @ counts_C
    if not wants_grad:
        return loss, logits_CV
    dlogits_CV = _loss_grad_(logits_CV, labels_C, form.label_smoothing)
    if counts_C is not None:
        dlogits_CV.mul_(counts_C[:, None])
    if slope_CV is not None:
        dlogits_CV.mul_(slope_CV)
    return loss, dlogits_CV.to(dtype)


def cap_(logits_CV: Tensor, softcap: float) -> Tensor:
    """Cap the logits in place and return the cap's slope at each of them."""
    tanh_CV = logits_CV.div_(softcap).tanh_()
    slope_CV = tanh_CV.square().neg_().add_(1)
    tanh_CV.mul_(softcap)
    return slope_CV


def _token_losses_(logits_CV: Tensor, labels_C: Tensor, label_smoothing: float) -> Tensor:
    """Turn the logits into log-probabilities in place and return each token's loss (C,)."""
    torch.log_softmax(logits_CV, dim=-1, out=logits_CV)
    losses_C = -logits_CV.gather(1, labels_C[:, None]).squeeze(1)
    if label_smoothing:
        losses_C.mul_(1 - label_smoothing).sub_(logits_CV.mean(-1), alpha=label_smoothing)
    return losses_C


def _loss_grad_(logprobs_CV: Tensor, labels_C: Tensor, label_smoothing: float) -> Tensor:
    """Turn the log-probabilities in place into the gradient of the chunk's loss by its logits."""
    probs_CV = logprobs_CV.exp_()
    hit_C1 = torch.full_like(labels_C[:, None], -(1 - label_smoothing), dtype=probs_CV.dtype)
    probs_CV.scatter_add_(1, labels_C[:, None], hit_C1)
    return probs_CV.sub_(label_smoothing / probs_CV.shape[1]) if label_smoothing else probs_CV
