"""The kernels of decoding against their references, as parity.py has the others'; called as that is."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from parity import DEVICE, Check, drawn, main, nan, wide
from torch import Tensor

from jebi.kernels import cached_attention, few_rows
from jebi.kernels.cached_attention import Form, HeadNorms
from jebi.kernels.glu import glu
from jebi.kernels.gpu import cached_attention as gpu_cached_attention
from jebi.kernels.gpu import few_rows as gpu_few_rows
from jebi.kernels.gpu import few_rows_before as gpu_few_rows_before
from jebi.kernels.gpu.few_rows_epilogue import Epilogue
from jebi.kernels.low_rank import LowRank
from jebi.kernels.rope import rope_tables
from jebi.quant import int8, nf4

AFTER = ((None, False), (None, True), ("silu", True), ("gelu_tanh", False), ("gelu", True))
"""Activations, and whether there are a bias, an adapter, a factor and a residual too."""


def truncates(dtype: torch.dtype) -> bool:
    """The interpreter rounds to bfloat16 towards zero, and multiplies matrices of it by their bits."""
    return DEVICE == "cpu" and dtype == torch.bfloat16


def stored_weights(rows: int, columns: int, dtype: torch.dtype) -> dict[str, few_rows.Weight]:
    """A weight of two maps in every form: dense, int8, NF4 whose scales are coded, or never were."""
    whole = drawn(rows, columns, seed=3, dtype=dtype) / columns**0.5
    maps = [whole[: rows // 3].clone(), whole[rows // 3 :].clone()]
    coded = [nf4.NF4Weight.quantize(part) for part in maps]
    plain = [nf4.NF4Weight(w.packed, w.scales(), None, None, shape=w.shape, dtype=dtype) for w in coded]
    forms = {
        "dense": few_rows.stacked(maps),
        "int8": few_rows.stacked([int8.Int8Weight.quantize(part) for part in maps]),
        "nf4": few_rows.stacked(coded),
        "nf4 plain": few_rows.stacked(plain),
    }
    return {name: weight for name, weight in forms.items() if weight is not None}


def check_few_rows(dtype: torch.dtype) -> Iterator[Check]:
    """Every form and number of rows, with everything that may come after the product and with nothing."""
    if truncates(dtype):
        return
    cases = ((20, 64, 1, 11, AFTER), (38, 192, 2, 70, AFTER[1:3]), (20, 1152, 6, 12, AFTER[2:3]))
    # The last three have ranks by eights, the second two slices a row and two turns.
    cases += ((40, 320, 13, 8, AFTER[1:3]), (32, 1024, 3, 48, AFTER[2:3]), (32, 4096, 2, 72, AFTER[2:3]))
    for rows, columns, tokens, ranks, afters in cases:
        x = drawn(tokens, columns + 8, dtype=dtype)[:, :columns]
        for name, weight in stored_weights(rows, columns, dtype).items():
            stored = few_rows.as_stored(weight)
            for activation, full in afters:
                width = rows if activation is None else rows // 2
                bias = drawn(rows, seed=5, dtype=dtype) if full else None
                left, right = drawn(tokens, ranks, seed=6, dtype=dtype) / 4, drawn(rows, ranks, seed=7, dtype=dtype)
                thin = LowRank(left, right.t()) if full else None
                residual = drawn(tokens, width, seed=8, dtype=dtype) if full else None
                after = (bias, thin, activation, 0.5 if full and activation is not None else 1.0, residual)
                plain, exact = few_rows.product_reference(x, weight, *after), exact_product(x, weight, *after)
                epilogue = Epilogue(
                    bias,
                    left if full else None,
                    right if full else None,
                    few_rows.ACTIVATIONS.get(activation),
                    after[3],
                    residual,
                )
                for dots, given in product({False, gpu_few_rows.by_dots(x)}, (x, as_laid(x))):
                    out = wide(tokens, width, dtype)
                    gpu_few_rows.product(given, stored, epilogue, out, dots=dots)
                    said = f"{rows}x{columns} {tokens} {activation}{' and all' * full}{' by dots' * dots}"
                    yield f"few rows {name} {said} {type(given).__name__}", out, plain, exact


_CUTS = {
    "nf4": ((16, 4, 1), (16, 8, 1), (32, 4, 1), (16, 4, 2), (16, 8, 2), (32, 2, 1)),
    "int8": ((32, 2, 2), (16, 8, 2), (32, 4, 1), (16, 4, 2)),
    "dense": ((16, 4, 2), (32, 4, 1), (16, 8, 2)),
}
"""Rows, warps and units by the weight's form."""


def check_few_rows_tiles(dtype: torch.dtype) -> Iterator[Check]:
    """Every way in which `tile_of` cuts weights of few rows on tensor cores, over several turns, even and uneven."""
    if dtype != torch.float16:
        return
    cuts = [(kind, cut, (4160, 3)) for kind, some in _CUTS.items() for cut in some]
    cuts += [("nf4", cut, (4096, 2)) for cut in _CUTS["nf4"]]
    for kind, cut, (columns, tokens) in cuts:
        x = drawn(tokens, columns, dtype=dtype)
        drawn_NK = drawn(40, columns, seed=3, dtype=dtype) / columns**0.5
        packed = {"nf4": nf4.NF4Weight, "int8": int8.Int8Weight}
        weight = few_rows.stacked([packed[kind].quantize(drawn_NK) if kind in packed else drawn_NK])
        assert weight is not None
        out = wide(tokens, 40, dtype)
        gpu_few_rows.product(as_laid(x), few_rows.as_stored(weight), Epilogue(), out, gpu_few_rows.Tile(*cut))
        plain, exact = few_rows.product_reference(x, weight), exact_product(x, weight, None, None, None, 1.0, None)
        yield f"few rows {kind} by {cut} {columns} {tokens}", out, plain, exact


def exact_product(
    x: Tensor,
    weight: few_rows.Weight,
    bias: Tensor | None,
    thin: LowRank | None,
    activation: str | None,
    factor: float,
    residual: Tensor | None,
) -> Tensor:
    """`few_rows.product_reference` in float64, of the weight as it is stored."""
    dense = weight if isinstance(weight, Tensor) else weight.dense(torch.float32)
    y = x.double() @ dense.double().t()
    y = y if bias is None else y + bias.double()
    y = y if thin is None else y + thin.left_TR.double() @ thin.right_RF.double()
    y = y if activation is None else glu(*y.chunk(2, dim=1), activation, factor)
    return y if residual is None else y + residual.double()


def check_few_rows_before(dtype: torch.dtype) -> Iterator[Check]:
    if truncates(dtype):
        return
    for tokens, width, ranks in ((1, 64, 5), (3, 131, 16)):
        x, down = drawn(tokens, width, dtype=dtype), drawn(ranks, width, seed=1, dtype=dtype) / width**0.5
        weight = drawn(width, seed=2, dtype=dtype)
        for norm in (None, (weight, 1e-5, False), (weight, 1e-5, True)):
            laid, xa = gpu_few_rows_before.normed_and_compressed(x, norm, down)
            y = in_order(laid, width)
            plain, plain_xa = few_rows.normed_and_compressed_reference(x, norm, down)
            exact = plain.double() if norm is None else x.double() * (weight.double() + norm[2])
            exact = exact if norm is None else exact / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            name = f"before few rows {tokens}x{width} {norm and norm[2]}"
            yield f"{name} normed", y, plain, exact
            # Of the rounded rows, as both have them.
            assert xa is not None
            yield f"{name} A", xa, plain_xa, y.double() @ down.double().t()
            bare, none = gpu_few_rows_before.normed_and_compressed(x, norm, None)
            assert none is None
            assert torch.equal(in_order(bare, width), y)


def in_order(laid: gpu_few_rows_before.Laid, columns: int) -> Tensor:
    """The rows (M, K) of what is laid."""
    x = laid.values.unflatten(0, (-1, 4)).unflatten(-1, (4, 8))  # 128 columns, pieces of 8, rows, 32 columns
    return x.permute(2, 0, 3, 1, 4).flatten(1)[: laid.tokens, :columns]


def as_laid(x: Tensor) -> gpu_few_rows_before.Laid:
    """Rows laid as `normed_and_compressed` leaves them."""
    return gpu_few_rows_before.normed_and_compressed(x, None, x[:1])[0]


def check_cached_attention(dtype: torch.dtype) -> Iterator[Check]:
    """One split and several, put together at once and in turns; rows of different lengths, heads of all sizes."""
    if truncates(dtype):
        return
    # Heads of queries and of keys, values of a head, how many are turned, slots, and the form.
    cases = (
        (4, 2, 16, 16, 150, Form(0.3)),
        (6, 2, 24, 12, 150, Form(0.2, 50, 5.0, value_scale=0.5)),
        (4, 4, 20, 12, 40, Form(0.3, None, 2.0, norms(20, dtype, False))),
        (4, 4, 16, 16, 40, Form(30.0, None, 5.0)),
        (8, 2, 16, 16, 200, Form(0.3, None, 50.0)),
        (8, 1, 16, 16, 1100, Form(0.3, 70, None, norms(16, dtype, True))),
        (32, 1, 72, 72, 300, Form(0.2)),
        (2, 1, 160, 160, 100, Form(0.1)),
        (100, 100, 16, 16, 70, Form(0.3)),
        (32, 8, 128, 128, 2300, Form(0.1)),
    )
    for case in cases:
        (_, groups, size, _, length, form), qkv, held, end, tables, counts = case, *cached_inputs(*case[:5], dtype)
        results = []
        for kind in (dtype, dtype, torch.float64):
            # Keys of a place lie side by side, and values of a head.
            keys, values = held[0].to(kind).transpose(1, 2).clone().transpose(1, 2), held[1].to(kind)
            if not results:
                out = attended(qkv, tables, (keys, values), end, form, counts)
            else:
                weights = () if form.norms is None else (*(x.to(kind) for x in form.norms[:2]), *form.norms[2:])
                fine = replace(form, norms=weights or None)
                turning = tuple(table.to(kind) for table in tables)
                out = cached_attention.cached_attention_reference(qkv.to(kind), turning, (keys, values), end, fine)
            results.append((out, keys, values))
        assert not counts.any()
        for name, ours, plain, exact in zip(("out", "keys", "values"), *results):
            yield f"cached attention {case[0]}/{groups} {size} {length} {form.window} {name}", ours, plain, exact
        if DEVICE != "cpu":
            # By turns with other heads, so that what lay in the cache, in the splits' place and in a multiprocessor's
            # own memory before is another's; and who ends last differs from time to time.
            caches, other = results[0][1:], qkv.flip(1).contiguous()
            expected = [attended(x, tables, caches, end, form, counts) for x in (qkv, other)]
            assert torch.equal(expected[0], results[0][0])
            for turn in range(200):
                again = attended((qkv, other)[turn % 2], tables, caches, end, form, counts)
                assert torch.equal(again, expected[turn % 2])


Tensors = tuple[Tensor, Tensor]


def cached_inputs(
    heads: int, groups: int, size: int, turned: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensors, Tensor]:
    """Heads of three rows, keys and values before them, ends, tables and counts."""
    width = (heads + 2 * groups) * size
    qkv = wide(3, width, dtype).copy_(drawn(3, width, dtype=dtype))
    end = torch.tensor([length, 33, 1], dtype=torch.int32).to(DEVICE)
    tables = rope_tables(end - 1, 1 / 10 ** (torch.arange(turned // 2).to(DEVICE) / 4), 1.1, dtype)
    held = drawn(2, 3, groups, length, size, seed=1, dtype=dtype)
    return qkv, held, end, tables, torch.zeros(3 * groups, dtype=torch.int32).to(DEVICE)


def attended(qkv: Tensor, tables: Tensors, caches: Tensors, end: Tensor, form: Form, counts: Tensor) -> Tensor:
    groups, size = caches[0].shape[1], caches[0].shape[3]
    out = nan(3, qkv.shape[1] - 2 * groups * size, dtype=qkv.dtype)
    gpu_cached_attention.attend(qkv, tables, caches, end, form, counts, out)
    return out


def norms(size: int, dtype: torch.dtype, unit_offset: bool) -> HeadNorms:
    return drawn(size, seed=1, dtype=dtype), drawn(size, seed=2, dtype=dtype), 1e-5, unit_offset


if __name__ == "__main__":
    main([check_few_rows, check_few_rows_tiles, check_few_rows_before, check_cached_attention])
