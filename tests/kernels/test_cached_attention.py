"""``kernels.cached_attention``'s reference: each row's new token as attention without a cache has it."""

import pytest
import torch

from jebi.kernels.cached_attention import Form, cached_attention
from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope, rope_tables
from jebi.nn.attention import AttentionForm, attend_cached, seen

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 8, 12
NORMS = *torch.linspace(-1, 1, 2 * SIZE, dtype=torch.float64).split(SIZE), 1e-5, True


@pytest.mark.parametrize(
    "form", [Form(0.3), Form(0.3, 5, norms=NORMS), Form(0.2, 5, 2.0), Form(0.3, value_scale=0.5)], ids=range(4)
)
def test_rows_attend_as_if_alone(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, (HEADS + 2 * GROUPS) * SIZE, generator=generator, dtype=torch.float64)
    before = torch.randn(2, 3, GROUPS, LENGTH, SIZE, generator=generator, dtype=torch.float64)
    ends = torch.tensor([12, 7, 1], dtype=torch.int32)
    tables = rope_tables(ends - 1, 1 / 10 ** (torch.arange(3, dtype=torch.float64) / 4), 1.0, torch.float64)
    keys, values = before.clone()
    counts = torch.zeros(3 * GROUPS, dtype=torch.int32)
    out = cached_attention(qkv, tables, (keys, values), ends, form, counts)

    q, k, v = qkv.unflatten(1, (-1, SIZE)).split([HEADS, GROUPS, GROUPS], dim=1)
    if form.norms is not None:
        q, k = (rms_norm(x, weight, *form.norms[2:]) for x, weight in ((q, NORMS[0]), (k, NORMS[1])))
    q, k, v = rope(q, *tables), rope(k, *tables), v * form.value_scale
    for row, end in enumerate(ends.tolist()):
        for cache, new, old in zip((keys, values), (k, v), before):
            assert torch.equal(cache[row, :, end - 1], new[row])
            kept = [place for place in range(LENGTH) if place != end - 1]
            assert torch.equal(cache[row][:, kept], old[row][:, kept])
        held = (cache[row : row + 1, :, :end] for cache in (keys, values))
        mask = seen(1, end, end - 1, form.window, q.device)[None]
        plain = AttentionForm(form.scale, form.window, form.softcap)
        alone = attend_cached(q[row : row + 1, None], *held, mask, plain)
        # attend_cached takes capped scores in float32.
        exact = {} if form.softcap is None else {"atol": 1e-6, "rtol": 1e-6}
        torch.testing.assert_close(out[row], alone.flatten(), **exact)
