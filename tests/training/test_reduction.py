"""``training.reduction`` in a group of one process; what several make of it is `test_ranks`'."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from jebi.errors import ConfigError, RankError
from jebi.training.reduction import Reduction, explained


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_gradients_loss_and_the_wish_to_stop_travel_together() -> None:
    trained = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(300))]
    reduction = Reduction(trained)
    for stop in (False, True):
        reduction.gradients.begin()
        sum((3 * p).sum() for p in trained).backward()
        loss = reduction.run(torch.tensor(2.5), stop)
        assert loss.item() == 2.5
        assert all(p.grad is not None and torch.equal(p.grad, torch.full_like(p, 3)) for p in trained)
        assert reduction.stopping() is stop
        for p in trained:
            p.grad = None
    assert not reduction.stopping(), "a wish is heard once"


def test_what_is_not_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32"):
        Reduction([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])


def test_a_broken_connection_says_what_to_do() -> None:
    with pytest.raises(RankError, match=r"--resume.*reset by peer"), explained():
        raise RuntimeError("Connection reset by peer\nand more")
