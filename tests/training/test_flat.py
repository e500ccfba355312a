"""``training.flat``: matrices laid end to end, and the optimizer's step over them."""

from itertools import pairwise

import torch
from torch import nn

from jebi.training.flat import FlatGradients, lay_flat, starts_of, stretch_of
from jebi.training.optimizer import AdamW8bit, _laid_flat

SHAPES = [(5, 1000), (256, 32), (1, 4097), (4, 4)]


def parameters() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=drawn)) for shape in SHAPES]


def test_values_stay_and_lie_in_blocks() -> None:
    trained, before = parameters(), parameters()
    _, grads = lay_flat(trained)
    assert all(torch.equal(a, b) for a, b in zip(trained, before))
    places = [p.data_ptr() for p in trained]
    assert all((b - a) % (4 * 256) == 0 for a, b in pairwise(places))
    assert [g.shape for g in grads] == [p.shape for p in trained]
    lay_flat(trained)
    assert [p.data_ptr() for p in trained] == places, "what lies flat is left where it is"


def test_a_stretch_is_found_only_where_everything_lies_in_it() -> None:
    trained = parameters()
    starts, size = starts_of(trained)
    assert stretch_of(trained, starts, size) is None
    lay_flat(trained)
    found = stretch_of(trained, starts, size)
    assert found is not None
    assert torch.equal(found[: trained[0].numel()], trained[0].detach().flatten())
    assert stretch_of(trained[::-1], *starts_of(trained[::-1])) is None
    assert stretch_of([*trained[:-1], trained[-1].detach().double()], starts, size) is None


def test_the_optimizer_makes_the_same_step_in_place() -> None:
    """To the bit: the same operations on the same layout, padding included."""
    flat, apart = parameters(), parameters()
    grads_T, grads = lay_flat(flat)
    place, versions = flat[1].data_ptr(), [p._version for p in flat]
    optimizers = [AdamW8bit(params, lr=1e-2) for params in (flat, apart)]
    for step in range(3):
        for one, other, grad in zip(flat, apart, grads):
            other.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            one.grad = grad.copy_(other.grad)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(flat, apart))
    assert [_laid_flat(bucket) is not None for bucket in optimizers[0]._buckets.values()] == [True, True]
    assert [_laid_flat(bucket) is not None for bucket in optimizers[1]._buckets.values()] == [False, False]
    assert flat[1].data_ptr() == place
    assert all(p._version > version for p, version in zip(flat, versions))
    assert grads_T.abs().sum() > 0


def test_gradients_begin_at_zero_where_they_were_dropped_and_stay_otherwise() -> None:
    trained = parameters()
    flat = FlatGradients(trained, spare=2)
    assert flat.whole_T.numel() == starts_of(trained)[1] + 2
    for dropped in (False, True):
        flat.begin()
        sum((p * p).sum() for p in trained).backward()
        if not dropped:
            flat.begin()
            assert all(torch.equal(p.grad, 2 * p) for p in trained if p.grad is not None)
            for p in trained:
                p.grad = None
    assert all(p.grad is not None and torch.equal(p.grad, 2 * p) for p in trained)
    assert torch.isclose(flat.whole_T.norm(), torch.cat([2 * p.detach().flatten() for p in trained]).norm())
