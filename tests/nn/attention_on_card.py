"""``nn.attention_pair`` on a card, against ``nn.attention.attend_rows`` under autograd; both against float32.

    python tests/nn/attention_on_card.py

Prints, for every case, the way it went, the errors of the output and of the gradients beside autograd's own, the times
of forward and backward in milliseconds, and what the backward took of memory. Fails at the first case whose error is
more than twice autograd's, one rounding granted. The 65,536 tokens at the end go through the heads in pieces; they are
held against autograd itself.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from jebi.nn.attention import attend_rows
from jebi.nn.attention_pair import attention_backward, attention_forward
from jebi.nn.rows import Rows, rows_from_lengths
from jebi.nn.shape import AttentionForm

CARD = torch.device("cuda", 0)
LENGTHS = ([4096], [2048] * 4, [1000, 37, 3000, 1, 59])
HEADS = ((32, 8, 128), (16, 16, 64), (8, 2, 64), (4, 1, 128))
Gradients = list[Tensor]


def inputs(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Gradients:
    """Queries, keys and values as columns of one matrix, as a stacked product gives them; the output's gradient."""
    torch.manual_seed(0)
    query, key, size = heads
    whole = torch.randn(tokens, (query + 2 * key) * size, device=CARD).to(dtype)
    parts = whole.split([query * size, key * size, key * size], dim=1)
    return [*(x.unflatten(1, (-1, size)) for x in parts), torch.randn(tokens, query, size, device=CARD).to(dtype)]


def autograd(values: Gradients, rows: Rows, form: AttentionForm) -> tuple[Tensor, Callable[[], Gradients]]:
    leaves = [x.detach().requires_grad_() for x in values[:3]]
    out = attend_rows(*leaves, rows, form)
    return out.detach(), lambda: list(torch.autograd.grad(out, leaves, values[3], retain_graph=True))


def pair(values: Gradients, rows: Rows, form: AttentionForm) -> tuple[Tensor, Callable[[], Gradients]]:
    q, k, v, dout = values
    attended = attention_forward(q, k, v, rows, form)

    def backward() -> Gradients:
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=CARD) for x in (q, k, v)]

        def take(heads: slice, groups: slice, *some: Tensor) -> None:
            for whole, part, piece in zip(gradients, (heads, groups, groups), some, strict=True):
                whole[:, part] = piece

        attention_backward(dout, (q, k, v), attended, rows, form, take)
        return gradients

    print(f"{attended.way:6}", end=" ")
    return attended.mixed(rows, q.dtype), backward


def timed(run: Callable[[], object]) -> float:
    """Milliseconds, the best of five after a warm-up."""
    run()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best


def peak(run: Callable[[], object]) -> float:
    """MiB that a call takes beside what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact).square().mean() / exact.square().mean()).sqrt().item()


def check(name: str, values: Gradients, rows: Rows, form: AttentionForm, exact: Gradients | None) -> None:
    """One case; without an exact result autograd's is taken for it, and what may be off is a few roundings."""
    rounding = torch.finfo(values[0].dtype).eps
    print(f"{name:48}", end=" ")
    other_out, other_backward = autograd(values, rows, form)
    other = [other_out, *other_backward()]
    out, backward = pair(values, rows, form)
    ours = [out, *backward()]
    exact = exact or [x.float() for x in other]
    errors = [(error(x, e), error(y, e)) for x, y, e in zip(ours, other, exact, strict=True)]
    times = [timed(lambda: autograd(values, rows, form)), timed(other_backward)]
    with torch.no_grad():
        mine = [timed(lambda: attention_forward(*values[:3], rows, form)), timed(backward)]
    print(" ".join(f"{a:.1e}/{b:.1e}" for a, b in errors), end="  ")
    print(f"forward {mine[0]:.2f} ({times[0]:.2f}) backward {mine[1]:.2f} ({times[1]:.2f}) ms", end="  ")
    print(f"{peak(backward):.0f} ({peak(other_backward):.0f}) MiB")
    if not all(own <= 2 * max(theirs, rounding) for own, theirs in errors):
        sys.exit(f"{name}: off")


def main() -> None:
    """Every case in both 16-bit dtypes."""
    for dtype in (torch.bfloat16, torch.float16):
        for lengths in LENGTHS:
            rows = rows_from_lengths(lengths, CARD)
            for heads in HEADS:
                for window in (None, 512) if heads == HEADS[0] else (None,):
                    form = AttentionForm(heads[2] ** -0.5, window)
                    values = inputs(sum(lengths), heads, dtype)
                    fine, backward = autograd([x.float() for x in values], rows, form)
                    check(f"{dtype} {lengths} {heads} {window}", values, rows, form, [fine, *backward()])
    for length in (32768, 65536):
        form = AttentionForm(128**-0.5)
        check(f"{length}", inputs(length, HEADS[0], torch.bfloat16), rows_from_lengths([length], CARD), form, None)


if __name__ == "__main__":
    main()
