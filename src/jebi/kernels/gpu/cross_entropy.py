"""Cross-entropy of ready logits and its gradient, in place: one program a token, the row read twice.

All logits of a token at once, or those of one slice of the vocabulary after the other.

Shapes: C tokens of a chunk, V vocabulary, S rows of a slice.
"""

import triton
import triton.language as tl
from torch import Tensor

from jebi.kernels.gpu.launch import launch

_BLOCK = 4096


def loss_and_grad_(
    logits_CV: Tensor,
    labels_C: Tensor,
    counts_C: Tensor | None,
    losses_C: Tensor,
    settings: tuple[float, float | None, bool],
) -> None:
    """Write each token's loss times its count into ``losses_C``, and over the logits their gradient.

    Args:
        logits_CV: contiguous, any float dtype; overwritten where a gradient is wanted.
        labels_C: int64; a negative label has no loss and no gradient.
        counts_C: float32, how often each token counts; once when None.
        losses_C: float32.
        settings: label smoothing, the cap of the logits or None, and whether a gradient is wanted.
    """
    smoothing, softcap, wants_grad = settings
    tokens, vocabulary = logits_CV.shape
    launch(
        _cross_entropy, (tokens,),
        logits_CV, labels_C, losses_C if counts_C is None else counts_C, losses_C,
        vocabulary, smoothing, softcap or 0.0,
        COUNTED=counts_C is not None, CAPPED=softcap is not None, SMOOTHED=smoothing > 0, GRAD=wants_grad,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip


def fold_(
    logits_CS: Tensor,
    labels_C: Tensor,
    seen: tuple[Tensor, Tensor, Tensor, Tensor],
    rescale_C: Tensor,
    softcap: float | None,
    wants_grad: bool,
) -> None:
    """Add a slice's logits to what is seen, as `sliced_cross_entropy.fold_` does where labels are not smoothed.

    Args:
        logits_CS: contiguous, any float dtype; the shares are written over them where a gradient is wanted.
        labels_C: int64, counted from the slice's first row; the label may be in another slice.
        seen: float32, changed in place: top, others, hit and slope.
        rescale_C: float32, written.
        softcap: the cap of the logits, or None.
        wants_grad: whether the shares are wanted.
    """
    tokens, rows = logits_CS.shape
    launch(
        _fold, (tokens,),
        logits_CS, labels_C, *seen, rescale_C, rows, softcap or 0.0,
        CAPPED=softcap is not None, GRAD=wants_grad,
        BLOCK=min(_BLOCK, triton.next_power_of_2(rows)), num_warps=8,
    )  # fmt: skip


@triton.jit
def _tanh(x):
    """By its exponential, which no infinity spoils."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _cross_entropy(
    logits_ptr, labels_ptr, counts_ptr, losses_ptr, vocabulary, smoothing, softcap,
    COUNTED: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    count = tl.load(counts_ptr + row) if COUNTED else 1.0
    count = tl.where(label < 0, 0.0, count)
    logits_ptr += row * vocabulary
    # One running maximum and sum a lane, joined at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, columns < vocabulary, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(columns < vocabulary, _tanh(x / softcap) * softcap, float("-inf"))
        higher = tl.maximum(top, x)
        # A lane that has seen nothing yet adds nothing: exp(-inf - -inf) would be NaN.
        total = total * tl.where(top == float("-inf"), 0.0, tl.exp(top - higher)) + tl.where(
            x == float("-inf"), 0.0, tl.exp(x - higher)
        )
        top = higher
        if SMOOTHED:
            plain += tl.where(columns < vocabulary, x, 0.0)
    highest = tl.max(top, 0)
    normaliser = highest + tl.log(tl.sum(total * tl.where(top == float("-inf"), 0.0, tl.exp(top - highest)), 0))
    hit = tl.load(logits_ptr + tl.maximum(label, 0)).to(tl.float32)
    if CAPPED:
        hit = _tanh(hit / softcap) * softcap
    loss = normaliser - hit
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (normaliser - tl.sum(plain, 0) / vocabulary)
    tl.store(losses_ptr + row, loss * count)
    if GRAD:
        # Every thread has read the label's logit before any of them is written over.
        tl.debug_barrier()
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = tl.load(logits_ptr + columns, inside, other=0.0).to(tl.float32)
            tanh = x
            if CAPPED:
                tanh = _tanh(x / softcap)
                x = tanh * softcap
            grad = tl.exp(x - normaliser) - tl.where(columns == label, 1.0 - smoothing, 0.0)
            if SMOOTHED:
                grad -= smoothing / vocabulary
            if CAPPED:
                grad *= 1.0 - tanh * tanh
            tl.store(logits_ptr + columns, (grad * count).to(logits_ptr.dtype.element_ty), inside)


@triton.jit
def _fold(
    logits_ptr, labels_ptr, top_ptr, others_ptr, hit_ptr, slope_ptr, rescale_ptr, rows, softcap,
    CAPPED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    before = tl.load(top_ptr + token)
    logits_ptr += token * rows
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + columns, columns < rows, other=float("-inf")).to(tl.float32)
        if CAPPED:
            x = tl.where(columns < rows, _tanh(x / softcap) * softcap, float("-inf"))
        higher = tl.maximum(top, x)
        # As above; the label's own share is left out.
        total = total * tl.where(top == float("-inf"), 0.0, tl.exp(top - higher)) + tl.where(
            (x == float("-inf")) | (columns == label), 0.0, tl.exp(x - higher)
        )
        top = higher
    highest = tl.maximum(tl.max(top, 0), before)
    rescale = tl.exp(before - highest)
    others = tl.load(others_ptr + token) * rescale
    others += tl.sum(total * tl.where(top == float("-inf"), 0.0, tl.exp(top - highest)), 0)
    found = (label >= 0) & (label < rows)
    hit = tl.load(logits_ptr + tl.where(found, label, 0)).to(tl.float32)
    slope = 1.0
    if CAPPED:
        bent = _tanh(hit / softcap)
        hit = bent * softcap
        slope = 1.0 - bent * bent
    # Every thread has read what is seen and the label's logit before any of them is written over.
    tl.debug_barrier()
    tl.store(top_ptr + token, highest)
    tl.store(others_ptr + token, others)
    tl.store(rescale_ptr + token, rescale)
    tl.store(hit_ptr + token, hit, found)
    tl.store(slope_ptr + token, slope, found)
    if GRAD:
        for start in range(0, rows, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < rows
            x = tl.load(logits_ptr + columns, inside, other=0.0).to(tl.float32)
            if CAPPED:
                tanh = _tanh(x / softcap)
                share = tl.exp(tanh * softcap - highest) * (1.0 - tanh * tanh)
            else:
                share = tl.exp(x - highest)
            share = tl.where(columns == label, 0.0, share)
            tl.store(logits_ptr + columns, share.to(logits_ptr.dtype.element_ty), inside)
