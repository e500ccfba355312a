"""``training.optimizer`` against bitsandbytes' AdamW8bit, and its own promises: saving, skipping, errors."""

import copy
import io
import logging

import pytest
import torch
from torch import Tensor, nn

from jebi.errors import ConfigError
from jebi.training.optimizer import AdamW8bit

STATE_NAMES = ("state1", "state2", "absmax1", "absmax2")
# Whole blocks, a short last block, one value over 4096, below 4096 (float32 moments), a vector, a scalar, and
# one that is longer than a stretch.
SHAPES = ((16, 576), (576, 16), (67, 73), (4097,), (40, 40), (7,), (), (600, 1000))
SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}


@pytest.fixture(scope="module")
def bnb():
    """Import bitsandbytes without its complaint that an optional package for CPUs is missing."""
    logging.disable(logging.WARNING)
    try:
        return pytest.importorskip("bitsandbytes")
    finally:
        logging.disable(logging.NOTSET)


def make_params(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for number, param in enumerate(params):
        scale = 10.0 ** (number % 5 - 4)
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_same_state(left: dict, right: dict) -> None:
    for name in ("step", *STATE_NAMES):
        assert (name in left) == (name in right)
        if name in left:
            assert torch.equal(torch.as_tensor(left[name]), torch.as_tensor(right[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_bitsandbytes(bnb, dtype: torch.dtype) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    optimizer, oracle = AdamW8bit(ours, **SETTINGS), bnb.optim.AdamW8bit(theirs, **SETTINGS)
    run(optimizer, ours, range(25))
    run(oracle, theirs, range(25))
    for our, their in zip(ours, theirs, strict=True):
        # torch's vector and scalar loops round multiply-add differently (once or twice), and a value's place
        # in the bucket decides which loop it meets: a last bit may differ, and rarely a code by one.
        torch.testing.assert_close(our, their, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
        mine, other = optimizer.state[our], oracle.state[their]
        for name in STATE_NAMES[: 4 if "absmax1" in other else 2]:
            if mine[name].dtype == torch.uint8:
                steps_apart = (mine[name].int() - other[name].int()).abs()
                assert steps_apart.max() <= 1
                assert (steps_apart != 0).float().mean() < 1e-4
            else:
                torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-12)
