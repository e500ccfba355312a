"""``kernels.cached_attention``'s references: equal to attention without a cache, row by row."""

import pytest
import torch

from jebi.kernels.cached_attention import cached_attention, turned_and_stored
from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope, rope_tables
from jebi.nn.attention import AttentionForm, attend_cached, seen


@pytest.mark.parametrize("form", [(0.3, None, None), (0.3, 5, None), (0.2, 5, 2.0)])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_attend_as_if_alone(form, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, new, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(3, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    extent = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([12, 9, 7], dtype=torch.int32)
    out = cached_attention(q, k, v, extent, form)
    for row, (first, end) in enumerate(zip(*(x.tolist() for x in extent))):
        mask = seen(new, end - first, end - first - new, form[1], q.device)[None]
        alone = attend_cached(
            q[row : row + 1], *(x[row : row + 1, :, first:end] for x in (k, v)), mask, AttentionForm(*form)
        )
        # attend_cached takes capped scores in float32.
        exact = {} if form[2] is None else {"atol": 1e-6, "rtol": 1e-6}
        torch.testing.assert_close(out[row : row + 1], alone, **exact)


@pytest.mark.parametrize("normed", [False, True])
def test_new_keys_come_to_their_places(normed: bool) -> None:
    batch, new, heads, groups, size = 2, 3, 4, 2, 8
    qkv = torch.randn(batch * new, (heads + 2 * groups) * size, generator=torch.Generator().manual_seed(0))
    tables = rope_tables(torch.tensor([4, 5, 6, 0, 1, 2]), 1 / 10 ** (torch.arange(3) / 4), 1.0, torch.float32)
    norms = (torch.randn(size), torch.randn(size), 1e-5, True) if normed else None
    caches = [torch.zeros(batch, groups, 9, size) for _ in range(2)]
    q = turned_and_stored(qkv, tables, *caches, torch.tensor([7, 3], dtype=torch.int32), norms)
    parts = list(qkv.unflatten(1, (-1, size)).split([heads, groups, groups], dim=1))
    for number in range(2):
        if norms is not None:
            parts[number] = rms_norm(parts[number], norms[number], *norms[2:])
        parts[number] = rope(parts[number], *tables)
    assert torch.equal(q.flatten(0, 1), parts[0])
    for cache, part in zip(caches, parts[1:]):
        assert torch.equal(cache[0, :, 4:7].transpose(0, 1), part[:3])
        assert torch.equal(cache[1, :, :3].transpose(0, 1), part[3:])
        assert cache.count_nonzero() == part.numel()
