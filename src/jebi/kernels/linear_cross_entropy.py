"""Cross-entropy of a linear head, in chunks of tokens: all the logits never exist at once.

The caller passes only tokens that have a label. When the hidden states need a gradient it is computed in the
forward, chunk by chunk, while the chunk's logits are at hand; the head's weight is frozen and gets none.

Shapes: N labelled tokens, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's logits. A constant, so that equal seeds give equal sums whatever else runs on the machine."""


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Reference, differentiable: the summed loss with all logits (N, V) at once, the softmax in float32."""
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=label_smoothing)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    label_smoothing: float = 0.0,
    counts_N: Tensor | None = None,
) -> Tensor:
    """Sum over the tokens of the cross-entropy of ``hidden @ weight.T``; float32 scalar.

    Args:
        hidden_ND: (N, D), float32, bfloat16 or float16.
        weight_VD: (V, D) of the same dtype, frozen.
        labels_N: (N,) int64 in [0, V).
        label_smoothing: share of the target spread evenly over the vocabulary.
        counts_N: (N,) float32, how often each token counts; once when None.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, label_smoothing, counts_N)
    return loss


def chunk_tokens(vocabulary: int) -> int:
    """Tokens in one chunk: as many as `CHUNK_BYTES` of float32 logits hold, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        label_smoothing: float,
        counts_N: Tensor | None,
    ) -> Tensor:
        needs_grad = hidden_ND.requires_grad
        grad_ND = torch.empty_like(hidden_ND) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        step = chunk_tokens(weight_VD.shape[0])
        for start in range(0, hidden_ND.shape[0], step):
            part = slice(start, start + step)
            logits_CV = (hidden_ND[part] @ weight_VD.t()).float()
            losses_C = _token_losses(logits_CV, labels_N[part], label_smoothing)
            total += losses_C.sum() if counts_N is None else losses_C @ counts_N[part]
            if grad_ND is not None:
                dlogits_CV = _loss_grad_(logits_CV, labels_N[part], label_smoothing)
                if counts_N is not None:
                    dlogits_CV.mul_(counts_N[part, None])
                torch.mm(dlogits_CV.to(weight_VD.dtype), weight_VD, out=grad_ND[part])
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        # In float32 first: under loss scaling the incoming factor alone may exceed what float16 holds.
        scaled_ND = grad_ND.float().mul_(grads[0]).to(grad_ND.dtype)
        return scaled_ND, None, None, None, None


def _token_losses(logits_CV: Tensor, labels_C: Tensor, label_smoothing: float) -> Tensor:
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
