"""Every Triton kernel against its plain-torch reference, on small shapes, interpreted on the CPU or compiled on a card.

    TRITON_INTERPRET=1 python tests/kernels/gpu/parity.py
    python tests/kernels/gpu/parity.py cuda

Those of decoding are in parity_decoding.py. A process of its own, since Triton decides when a kernel is decorated
whether it is interpreted. Prints one line a case, and fails at the first that is off. The bar is the other tests': at
most twice plain torch's own error at the same dtype, one rounding granted.
"""

import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jebi.kernels.adamw8bit import Moments8, Rates, adamw8bit_
from jebi.kernels.dequantize import tables_on
from jebi.kernels.gather import gather_reference
from jebi.kernels.glu import glu
from jebi.kernels.gpu import adamw8bit as gpu_adamw8bit
from jebi.kernels.gpu import cross_entropy as gpu_cross_entropy
from jebi.kernels.gpu import fp8 as gpu_fp8
from jebi.kernels.gpu import gather as gpu_gather
from jebi.kernels.gpu import glu as gpu_glu
from jebi.kernels.gpu import int8 as gpu_int8
from jebi.kernels.gpu import nf4 as gpu_nf4
from jebi.kernels.gpu import rms_norm as gpu_rms_norm
from jebi.kernels.gpu import rope as gpu_rope
from jebi.kernels.linear_cross_entropy import LossForm, softcapped
from jebi.kernels.low_rank import LowRank, summed
from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope, rope_tables
from jebi.kernels.sliced_cross_entropy import Seen, fold_
from jebi.quant import dynamic8, fp8, int8, nf4

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Check = tuple[str, Tensor, Tensor, Tensor]
"""Name, the kernel's result, plain torch's, and the one in float64."""


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def wide(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A place for a matrix in a wider one, filled with NaN."""
    return nan(rows, columns + 7, dtype=dtype)[:, :columns]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def gradients(forward: Callable[..., Tensor], dout: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = forward(*leaves)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_rms_norm(dtype: torch.dtype) -> Iterator[Check]:
    for rows, width, offset in ((3, 7, False), (5, 64, True), (2, 131, True)):
        x, dy, residual = (drawn(rows, width, seed=n, dtype=dtype) for n in range(3))
        weight = drawn(width, seed=4, dtype=dtype) * 0.1 + (0 if offset else 1)
        y, rstd = gpu_rms_norm.forward(x, weight, 1e-5, offset)
        dx = gpu_rms_norm.backward(dy, x, rstd, weight, offset, residual)

        def plain(x: Tensor, weight: Tensor = weight, offset: bool = offset) -> Tensor:
            return rms_norm(x, weight, 1e-5, offset)

        def exact(x: Tensor, weight: Tensor = weight, offset: bool = offset) -> Tensor:
            return (weight.double() + (1 if offset else 0)) * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

        (out, grad), (fine, fine_grad) = gradients(plain, dy, x), gradients(exact, dy.double(), x.double())
        yield f"rms_norm {rows}x{width} y", y, out, fine
        yield f"rms_norm {rows}x{width} dx", dx, grad + residual, fine_grad + residual.double()


def check_rope(dtype: torch.dtype) -> Iterator[Check]:
    for heads, size, rotated in ((3, 16, 16), (6, 20, 12), (1, 10, 10)):
        x = drawn(4, heads + 2, size, dtype=dtype)[:, 1:-1]
        cos, sin = rope_tables(
            torch.arange(4).to(DEVICE) * 3, 1 / 10 ** (torch.arange(rotated // 2).to(DEVICE) / 4), 1.1, dtype
        )
        out = nan(4, heads + 1, size, dtype=dtype)[:, :heads]
        gpu_rope.rotate(x, cos, sin, out, False)
        yield f"rope {heads}x{size}/{rotated}", out, rope(x, cos, sin), rope(x.double(), cos.double(), sin.double())
        back = x.clone()
        gpu_rope.rotate(back, cos, sin, back, True)
        yield f"rope {heads}x{size} backwards", back, rope(x, cos, -sin), rope(x.double(), cos.double(), -sin.double())


def check_rope_added(dtype: torch.dtype) -> Iterator[Check]:
    """Queries, keys and values in one launch, shares of several ranks, or none, added before."""
    for (queries, keys, size, rotated), ranks in (
        ((4, 2, 16, 16), (3, 3, 3)),
        ((3, 1, 20, 12), (2, 0, 17)),
        ((2, 2, 16, 16), (0, 0, 0)),
    ):
        if any(ranks) and DEVICE == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter multiplies matrices of bfloat16 by their bits
        tokens, counts = 19, (queries, keys, keys)
        whole = wide(tokens, sum(counts) * size, dtype)
        whole.copy_(drawn(tokens, sum(counts) * size, dtype=dtype))
        left = drawn(tokens, sum(ranks) + 1, seed=1, dtype=dtype) / 4
        right = drawn(sum(counts) * size, sum(ranks) + 1, seed=2, dtype=dtype)
        shares, row, column = [], 0, 0
        for count, rank in zip(counts, ranks):
            rows, columns = slice(row, row + count * size), slice(column, column + rank)
            shares.append(LowRank(left[:, columns], right[rows, columns].t()) if rank else None)
            row, column = row + count * size, column + rank
        frequencies = 1 / 10 ** (torch.arange(rotated // 2).to(DEVICE) / 4)
        cos, sin = rope_tables(torch.arange(tokens).to(DEVICE) * 3, frequencies, 1.1, dtype)
        before = whole.split([count * size for count in counts], dim=1)
        expected = []
        for kind in (dtype, torch.float64):
            parts = [sum_of(x.to(kind), share).unflatten(1, (-1, size)) for x, share in zip(before, shares)]
            turned = [rope(x, cos.to(kind), sin.to(kind)) for x in parts[:2]]
            expected.append(torch.cat([*turned, parts[2]], dim=1))
        out = whole.clone().unflatten(1, (-1, size))
        gpu_rope.rotate_added_(out, cos, sin, queries, keys, (shares[0], shares[1], shares[2]))
        yield f"rope {queries}+{keys}x{size}/{rotated} with {ranks}", out, *expected


def check_glu(dtype: torch.dtype) -> Iterator[Check]:
    """With and without thin products that are still to be added to gate, up and the incoming gradient."""
    cases = (
        ("silu", (0, 0, 0)),
        ("gelu_tanh", (3, 17, 2)),
        ("gelu", (0, 4, 0)),
        ("silu", (8, 0, 3)),
        ("silu", (40, 2, 40)),
    )
    for activation, ranks in cases:
        if any(ranks) and DEVICE == "cpu" and dtype == torch.bfloat16:
            continue  # the interpreter multiplies matrices of bfloat16 by their bits
        whole, da = drawn(67, 2 * 37, dtype=dtype) * 2, drawn(67, 37, seed=1, dtype=dtype)
        thins = [
            LowRank(drawn(67, rank, seed=rank, dtype=dtype) / 4, drawn(37, rank, seed=9, dtype=dtype).t())
            if rank
            else None
            for rank in ranks
        ]
        gate, up = whole.split(37, dim=1)

        def run(gate: Tensor, up: Tensor, activation: str = activation, thins: list[LowRank | None] = thins) -> Tensor:
            return glu(sum_of(gate, thins[0]), sum_of(up, thins[1]), activation)

        results = []
        for kind in (dtype, torch.float64):
            results.append(gradients(run, sum_of(da.to(kind), thins[2]), gate.to(kind), up.to(kind)))
        name = f"{activation} {ranks}"
        out = wide(67, 37, dtype)
        gpu_glu.forward(gate, up, activation, out, (thins[0], thins[1]))
        yield f"{name} forward", out, results[0][0], results[1][0]
        copies, small = [x.clone() for x in (da, gate, up)], wide(67, 37, dtype)
        gpu_glu.forward(gate, up, activation, small, (thins[0], thins[1]), 2.0**-5)
        gpu_glu.backward_(*copies, activation, (thins[0], thins[1]), thins[2], True, 2.0**-5)
        for kind, ours, plain, fine in zip(("forward", "dgate", "dup"), (small, *copies[1:]), *results):
            yield f"{name} {kind} at 2**-5", ours, plain * 2.0**-5, fine * 2.0**-5
        sums = gpu_glu.backward_(da, gate, up, activation, (thins[0], thins[1]), thins[2], True)
        assert torch.equal(da, out)
        for which, thin, made, values in zip(("dgate", "dup", "act"), thins, sums, (gate, up, da)):
            if thin is not None:
                exact = thin.left_TR.double().t() @ values.double()
                yield f"{name} sum with {which}", made, summed(thin, values), exact
        yield f"{name} dgate", gate, results[0][1], results[1][1]
        yield f"{name} dup", up, results[0][2], results[1][2]


def sum_of(x: Tensor, thin: LowRank | None) -> Tensor:
    return x if thin is None else x + thin.left_TR.to(x.dtype) @ thin.right_RF.to(x.dtype)


def check_nf4(dtype: torch.dtype) -> Iterator[Check]:
    levels, codes = torch.tensor(nf4.LEVELS).to(DEVICE), dynamic8.dynamic_code(signed=True).to(DEVICE)
    for rows, columns in ((5, 64), (3, 96), (33, 128), (7, 9)):
        weight = nf4.NF4Weight.quantize(drawn(rows, columns, dtype=dtype))
        out = wide(rows, columns, dtype)
        stored = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
        gpu_nf4.dequantize(*stored, (levels, codes), out)
        # The interpreter rounds to bfloat16 towards zero; on a card the bytes are equal there too.
        assert (DEVICE == "cpu" and dtype == torch.bfloat16) or torch.equal(out, weight.dense(dtype)), (rows, columns)
        yield f"nf4 {rows}x{columns}", out.contiguous(), weight.dense(dtype), weight.dense(torch.float32).double()


def check_int8(dtype: torch.dtype) -> Iterator[Check]:
    for rows, columns in ((5, 64), (3, 96), (33, 128), (7, 9)):
        weight = int8.Int8Weight.quantize(drawn(rows, columns, dtype=dtype))
        out = wide(rows, columns, dtype)
        gpu_int8.dequantize(weight.codes, weight.scales, out)
        # As in `check_nf4`.
        assert (DEVICE == "cpu" and dtype == torch.bfloat16) or torch.equal(out, weight.dense(dtype)), (rows, columns)
        yield f"int8 {rows}x{columns}", out.contiguous(), weight.dense(dtype), weight.dense(torch.float32).double()
        start = weight.unit if weight.unit < rows else 0
        below, part = weight.rows(start, rows), wide(rows - start, columns, dtype)
        gpu_int8.dequantize(below.codes, below.scales, part)
        assert torch.equal(part, out[start:]), (rows, columns)


def check_fp8_rows(dtype: torch.dtype) -> Iterator[Check]:
    for rows, width in ((5, 64), (3, 7), (2, 131)):
        x = torch.cat((drawn(rows, width + 2, dtype=dtype), torch.zeros(1, width + 2, dtype=dtype).to(DEVICE)))[:, 1:-1]
        out = e4m3_place(rows + 1, width)
        scale = gpu_fp8.quantize_rows(x, out)
        yield from same_rows(f"fp8 rows {rows}x{width}", out, scale, fp8.quantize_rows(x), x.double())


def check_fp8_from_nf4(dtype: torch.dtype) -> Iterator[Check]:
    """Two maps, one after the other, in one matrix and its transpose."""
    for height, columns in ((5, 64), (130, 192)):
        weights = [nf4.NF4Weight.quantize(drawn(height, columns, seed=seed, dtype=dtype)) for seed in (0, 1)]
        dense = torch.cat([weight.dense(torch.float32) for weight in weights])
        for transposed in (False, True):
            expected = fp8.quantize_rows(dense.t() if transposed else dense)
            out = e4m3_place(*expected.numbers_TK.shape)
            for number, weight in enumerate(weights):
                part = slice(number * height, (number + 1) * height)
                place, scale = (out[:, part], expected.scale_T1) if transposed else (out[part], expected.scale_T1[part])
                stored = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
                gpu_fp8.from_nf4((*stored, *tables_on(out.device)), weight.shape, scale, place, transposed)
            name = f"fp8 of nf4 {height}x{columns}{' transposed' * transposed}"
            yield from same_rows(name, out, expected.scale_T1, expected, (dense.t() if transposed else dense).double())


def e4m3_place(rows: int, columns: int) -> Tensor:
    """Room for numbers, e4m3 on a card. The interpreter carries wrongly when it rounds to that: float32 there."""
    return nan(rows, columns, dtype=torch.float32 if DEVICE == "cpu" else torch.float8_e4m3fn)


def same_rows(name: str, out: Tensor, scale: Tensor, expected: fp8.Fp8Rows, exact: Tensor) -> Iterator[Check]:
    """The numbers and scales are the reference's, to the bit."""
    numbers = out.clamp(-fp8.LARGEST, fp8.LARGEST).to(torch.float8_e4m3fn) if out.dtype == torch.float32 else out
    assert torch.equal(numbers.view(torch.uint8), expected.numbers_TK.contiguous().view(torch.uint8)), name
    assert torch.equal(scale, expected.scale_T1), name
    yield name, fp8.Fp8Rows(numbers, scale).dense(), expected.dense(), exact


def check_cross_entropy(dtype: torch.dtype) -> Iterator[Check]:
    labels, counts = torch.tensor([3, 0, -100, 40]).to(DEVICE), torch.tensor([1.0, 3.0, 2.0, 1.0]).to(DEVICE)
    for vocabulary, smoothing, softcap in ((41, 0.0, None), (41, 0.1, None), (5000, 0.0, 3.0), (5000, 0.1, 3.0)):
        logits = drawn(4, vocabulary, dtype=dtype) * 2
        losses = nan(4)
        kernel = logits.clone()
        gpu_cross_entropy.loss_and_grad_(kernel, labels, counts, losses, (smoothing, softcap, True))
        silent, again = logits.clone(), nan(4)
        gpu_cross_entropy.loss_and_grad_(silent, labels, counts, again, (smoothing, softcap, False))
        assert torch.equal(silent, logits)
        assert torch.equal(again, losses)

        def loss(x: Tensor, smoothing: float = smoothing, softcap: float | None = softcap) -> Tensor:
            x = softcapped(x if x.dtype == torch.float64 else x.float(), softcap)
            each = torch.nn.functional.cross_entropy(x, labels, reduction="none", label_smoothing=smoothing)
            return each * counts

        plain, fine = (gradients(loss, drawn(4) * 0 + 1, x) for x in (logits, logits.double()))
        yield f"loss V={vocabulary} {smoothing} {softcap}", losses, plain[0], fine[0]
        yield f"dlogits V={vocabulary} {smoothing} {softcap}", kernel, plain[1], fine[1]


def check_fold(dtype: torch.dtype) -> Iterator[Check]:
    """Two slices after each other; labels in the first, in the second, and at their edges."""
    for second, softcap in ((13, None), (5000, None), (5000, 3.0)):
        parts = [drawn(5, rows, seed=rows, dtype=dtype).cpu() * 2 for rows in (37, second)]
        labels = torch.tensor([0, 36, 37, 45, 36 + second])
        seen, plainly, first = Seen.nothing(5, torch.device(DEVICE)), Seen.nothing(5, torch.device("cpu")), 0
        for part in parts:
            ours, rescale, state = part.to(DEVICE, copy=True), nan(5), (seen.top, seen.others, seen.hit, seen.slope)
            silent, apart = part.to(DEVICE, copy=True), tuple(value.clone() for value in state)
            here = (labels - first).to(DEVICE)
            gpu_cross_entropy.fold_(silent, here, apart, nan(5), softcap, False)
            gpu_cross_entropy.fold_(ours, here, state, rescale, softcap, True)
            assert torch.equal(silent.cpu(), part)
            assert all(torch.equal(one, other) for one, other in zip(state, apart))
            plain, other, _ = fold_(part.clone(), labels - first, plainly, LossForm(softcap=softcap), True)
            first += part.shape[1]
        logits = softcapped(torch.cat(parts, 1).double(), softcap)
        top = logits.amax(1)
        shares = (logits - top[:, None]).exp().scatter_(1, labels[:, None], 0)
        slope = torch.ones_like(logits) if softcap is None else 1 - (logits / softcap).square()
        name, hit = f"fold S={second} {softcap}", labels[:, None]
        yield f"{name} others", seen.others.cpu(), plainly.others, shares.sum(1)
        # The loss before it is added up, in which the cap's roundings are as large as in `check_cross_entropy`.
        exact = logits.gather(1, hit).squeeze(1) - logits.logsumexp(1)
        yield (
            f"{name} loss",
            *((s.hit - s.top - (s.others + (s.hit - s.top).exp()).log()).cpu() for s in (seen, plainly)),
            exact,
        )
        yield f"{name} slope", seen.slope.cpu(), plainly.slope, slope.gather(1, hit).squeeze(1)
        yield f"{name} rescale", rescale.cpu(), other, (logits[:, :37].amax(1) - top).exp()
        yield f"{name} shares", ours.cpu(), plain, (shares * slope)[:, 37:]


def check_adamw8bit(dtype: torch.dtype) -> Iterator[Check]:
    """Both keep the same bytes but for values at the edge between two codes, where one rounding decides."""
    values = 256 * 3 + 40
    tables = [dynamic8.tables_on(signed, torch.device(DEVICE)) for signed in (True, False)]
    results = []
    for device in (DEVICE, "cpu"):
        param = drawn(values, dtype=dtype).to(device)
        states = torch.zeros(2, values, dtype=torch.uint8, device=device)
        moments = Moments8(*states, *torch.zeros(2, 4, device=device))
        moments.state1.fill_(127)
        for step in range(1, 5):
            grad, rates = drawn(values, seed=step, dtype=dtype).to(device), Rates(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
            if results:
                adamw8bit_(param, grad, moments, rates)
            else:
                gpu_adamw8bit.step_(param, grad, tuple(vars(moments).values()), rates, tables)
        results.append((param.cpu(), Moments8(*(state.cpu() for state in vars(moments).values()))))
    (ours, mine), (plain, other) = results
    for name in ("state1", "state2"):
        apart = (getattr(mine, name).int() - getattr(other, name).int()).abs()
        assert apart.max() <= 1, name
        assert (apart > 0).float().mean() < 0.01, name
    # Four steps of 1e-2 with moments that differ by a code here and there, which is 2 % at most, and four roundings of
    # parameters below 4.
    assert (ours.float() - plain.float()).abs().max() < 4 * 1e-2 * 0.02 + 4 * 4 * torch.finfo(dtype).eps
    yield "adamw8bit absmax", mine.absmax1, other.absmax1, other.absmax1.double()


def check_gather(dtype: torch.dtype) -> Iterator[Check]:
    """From a table in host memory, page-locked on a card; rows that are not there are NaN."""
    for rows, width in ((5, 7), (300, 1024), (9, 2500)):
        table = drawn(rows, width, dtype=dtype).cpu()
        table = table.pin_memory() if DEVICE == "cuda" else table
        ids = torch.tensor([0, rows - 1, 2, 2, 4]).to(DEVICE)
        out = nan(5, width, dtype=dtype)
        gpu_gather.gather(table, ids, out)
        expected = gather_reference(table, ids)
        assert torch.equal(out, expected)
        yield f"gather {rows}x{width}", out, expected, expected.double()
        gpu_gather.gather(table, torch.tensor([-1, 0, rows]).to(DEVICE), out[:3])
        assert out[:3].isnan().any(1).tolist() == [True, False, True]


CHECKS = [
    check_rms_norm,
    check_rope,
    check_rope_added,
    check_glu,
    check_nf4,
    check_int8,
    check_cross_entropy,
    check_fold,
    check_adamw8bit,
]
CHECKS += [check_gather]
if DEVICE == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
    CHECKS += [check_fp8_rows, check_fp8_from_nf4]


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def main(checks: list[Callable[[torch.dtype], Iterator[Check]]] = CHECKS) -> None:
    """Run every check at every dtype."""
    for check in checks:
        for dtype in DTYPES:
            for name, ours, plain, exact in check(dtype):
                assert ours.shape == plain.shape == exact.shape, name
                own, other = rms(ours.double() - exact), rms(plain.double() - exact)
                rounding = torch.finfo(ours.dtype).eps / 2 * rms(exact)
                print(f"{dtype!s:15} {name:40} {own:.2e} {other:.2e}")
                # A card's exponential is off by two roundings, and it contracts products and sums into one operation,
                # which float32 shows.
                times = 4 if DEVICE == "cuda" and ours.dtype == torch.float32 else 2
                if not own <= times * max(other, rounding):
                    sys.exit(f"{name} at {dtype}: error {own:.3g}, plain torch {other:.3g}")


if __name__ == "__main__":
    main()
