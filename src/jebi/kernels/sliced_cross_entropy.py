"""Cross-entropy of a linear head that comes in slices of the vocabulary: neither all logits nor the whole head exist.

For a head in host memory, or dequantised bit by bit. One sweep over the slices gives loss and gradient: as attention
does with keys (arXiv:2205.14135, section 3.1), each token keeps the largest logit so far, the sum of exponentials
relative to it, and the sum of rows weighted by them, which are rescaled as the largest grows. The label's own share is
kept out of both sums and comes in at the end: of a token that is learnt well, loss and gradient are small differences
between the two, and keep their digits so.

Heads that lie dense beside the hidden states are `linear_cross_entropy`'s.

Shapes: N labelled tokens, C tokens of a chunk, D width, V vocabulary, S rows of a slice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from jebi.config.limits import CHUNK_BYTES
from jebi.kernels.linear_cross_entropy import PLAIN, LossForm, cap_, lifted, scaled


class Slices(Protocol):
    """A frozen head (V, D), one slice of its rows after the other."""

    @property
    def vocabulary(self) -> int:
        """V."""
        ...

    @property
    def most(self) -> int:
        """Rows of the largest slice."""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """The slices from the first row on, in the hidden states' dtype and on their device; each until the next."""
        ...


@dataclass
class Seen:
    """What the slices so far say of each token: (C,) float32 each."""

    top: Tensor
    """Largest logit."""
    others: Tensor
    """Sum of exponentials of the logits less the largest, without the label's."""
    hit: Tensor
    """The label's logit."""
    slope: Tensor
    """The cap's slope there."""
    plain: Tensor
    """Sum of logits, for label smoothing."""

    @classmethod
    def nothing(cls, tokens: int, device: torch.device) -> "Seen":
        """Before the first slice."""
        zeros = torch.zeros(4, tokens, dtype=torch.float32, device=device)
        top = torch.full((tokens,), float("-inf"), dtype=torch.float32, device=device)
        return cls(top, zeros[0], zeros[1], zeros[2].fill_(1), zeros[3])


def sliced_cross_entropy(
    hidden_ND: Tensor, slices: Slices, labels_N: Tensor, form: LossForm = PLAIN, counts_N: Tensor | None = None
) -> Tensor:
    """As `linear_cross_entropy`, equal to it but for the order of sums; the head takes no gradient.

    Args:
        hidden_ND: (N, D), float32, bfloat16 or float16.
        slices: the head; gone through once for every chunk of tokens, and `chunk_tokens` makes chunks large.
        labels_N: (N,) int64 in [0, V).
        form: label smoothing and softcapping.
        counts_N: (N,) float32, how often each token counts; once when None.
    """
    loss: Tensor = _SlicedCrossEntropy.apply(hidden_ND, slices, labels_N, form, counts_N)
    return loss


def chunk_tokens(slices: Slices, width: int, element: int, on_card: bool) -> int:
    """Tokens in one chunk: what twice `CHUNK_BYTES` hold of logits, sums of rows, their summands and labels' rows.

    At least 16, or 512 on a card, as in `linear_cross_entropy`; there the logits stay in 16 bits.
    """
    each = slices.most * (element if on_card else 4) + width * (4 + 2 * element)
    return max(512 if on_card else 16, 2 * CHUNK_BYTES // each)


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, slices: Slices, labels_N: Tensor, form: LossForm, counts_N: Tensor | None
    ) -> Tensor:
        grad_ND, lift = None, None
        if ctx.needs_input_grad[0]:
            grad_ND = torch.empty_like(hidden_ND)
            counts_N, lift = lifted(labels_N, counts_N, hidden_ND.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        step = chunk_tokens(slices, hidden_ND.shape[1], hidden_ND.element_size(), hidden_ND.is_cuda)
        for start in range(0, hidden_ND.shape[0], step):
            part = slice(start, start + step)
            grad_CD = grad_ND[part] if grad_ND is not None else None
            counts_C = counts_N[part] if counts_N is not None else None
            total += _chunk(hidden_ND[part], slices, labels_N[part], counts_C, form, grad_CD)
        ctx.save_for_backward(grad_ND, lift)
        return total if lift is None else total / lift

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        grad_ND, lift = ctx.saved_tensors
        factor = grads[0] if lift is None else grads[0] / lift
        return None if grad_ND is None else scaled(grad_ND, factor), None, None, None, None


def _chunk(
    hidden_CD: Tensor,
    slices: Slices,
    labels_C: Tensor,
    counts_C: Tensor | None,
    form: LossForm,
    grad_CD: Tensor | None,
) -> Tensor:
    """A chunk's summed loss; its gradient by the hidden states goes into ``grad_CD``, where there is one."""
    seen = Seen.nothing(hidden_CD.shape[0], hidden_CD.device)
    sums_CD = torch.zeros_like(hidden_CD, dtype=torch.float32) if grad_CD is not None else None
    even_CD = torch.zeros_like(hidden_CD[:1], dtype=torch.float32)
    hit_CD = torch.zeros_like(hidden_CD)
    first = 0
    for slice_SD in slices:
        shares_CS, rescale_C, slope_CS = fold_(
            hidden_CD @ slice_SD.t(), labels_C - first, seen, form, grad_CD is not None
        )
        if sums_CD is not None:
            sums_CD.mul_(rescale_C[:, None]).add_(shares_CS @ slice_SD)
            here_C = (labels_C - first).clamp(0, slice_SD.shape[0] - 1)
            found_C1 = (labels_C - first == here_C)[:, None]
            hit_CD = torch.where(found_C1, slice_SD.index_select(0, here_C), hit_CD)
        del shares_CS  # before the next slice's are made
        if sums_CD is not None and form.label_smoothing:
            every_D = slice_SD.sum(0, dtype=torch.float32) if slope_CS is None else slope_CS @ slice_SD
            even_CD = even_CD + every_D
        first += slice_SD.shape[0]
    smoothing, below_C = form.label_smoothing, seen.hit - seen.top
    total_C = seen.others + below_C.exp()
    if sums_CD is not None and grad_CD is not None:
        sums_CD.div_(total_C[:, None])
        # The label's probability less its target.
        sums_CD.addcmul_(((smoothing - seen.others / total_C) * seen.slope)[:, None], hit_CD)
        if smoothing:
            sums_CD.sub_(even_CD, alpha=smoothing / slices.vocabulary)
        grad_CD.copy_(sums_CD if counts_C is None else sums_CD.mul_(counts_C[:, None]))
    losses_C = (seen.others + below_C.expm1()).log1p() - below_C
    if smoothing:
        # The even share's loss is the mean of all logits' instead of the label's.
        losses_C = losses_C + smoothing * (seen.hit - seen.plain / slices.vocabulary)
    return losses_C.sum() if counts_C is None else losses_C @ counts_C


def fold_(
    logits_CS: Tensor, labels_C: Tensor, seen: Seen, form: LossForm, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Add a slice's logits to what is seen.

    Args:
        logits_CS: overwritten.
        labels_C: counted from the slice's first row; the label may be in another slice.
        seen: changed in place.
        form: label smoothing and softcapping.
        wants_grad: whether the shares are wanted.

    Returns:
        The shares (C, S) in the logits' dtype: exponentials less the new largest logit, times the cap's slope, 0 for
        the label; what sums so far are to be multiplied by (C,); and the slopes in the logits' dtype, where there is a
        cap and labels are smoothed.
    """
    if logits_CS.is_cuda and not form.label_smoothing:
        from jebi.kernels.gpu import cross_entropy as gpu

        rescale_C = torch.empty_like(seen.top)
        gpu.fold_(
            logits_CS, labels_C, (seen.top, seen.others, seen.hit, seen.slope), rescale_C, form.softcap, wants_grad
        )
        return logits_CS, rescale_C, None
    dtype = logits_CS.dtype
    logits_CS = logits_CS.float()
    slope_CS = cap_(logits_CS, form.softcap) if form.softcap is not None else None
    column_C1 = labels_C.clamp(0, logits_CS.shape[1] - 1)[:, None]
    found_C = labels_C == column_C1.squeeze(1)
    top_C = torch.maximum(seen.top, logits_CS.amax(-1))
    rescale_C = (seen.top - top_C).exp_()
    seen.top = top_C
    seen.hit = torch.where(found_C, logits_CS.gather(1, column_C1).squeeze(1), seen.hit)
    if slope_CS is not None:
        seen.slope = torch.where(found_C, slope_CS.gather(1, column_C1).squeeze(1), seen.slope)
    if form.label_smoothing:
        seen.plain = seen.plain + logits_CS.sum(-1)
    shares_CS = logits_CS.sub_(top_C[:, None]).exp_()
    other_C1 = shares_CS.gather(1, column_C1).masked_fill_(found_C[:, None], 0)
    shares_CS.scatter_(1, column_C1, other_C1)
    seen.others = seen.others * rescale_C + shares_CS.sum(-1)
    if slope_CS is not None and wants_grad:
        shares_CS.mul_(slope_CS)
    slopes = slope_CS.to(dtype) if slope_CS is not None and form.label_smoothing else None
    return shares_CS.to(dtype), rescale_C, slopes
