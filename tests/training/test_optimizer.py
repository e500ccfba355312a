"""``training.optimizer`` against bitsandbytes' AdamW8bit, and its own promises: saving, skipping, errors."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from jebi.errors import ConfigError
from jebi.training.optimizer import AdamW8bit

# Whole blocks, a short last block, one value over 4096, below 4096 (float32 moments), a vector, a scalar, an
# empty tensor, and one that is longer than a stretch.
SHAPES = ((16, 576), (576, 16), (67, 73), (4097,), (40, 40), (7,), (), (0, 3), (600, 1001))
SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.02}


def make_params(dtype: torch.dtype = torch.float32, shapes: tuple = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for number, param in enumerate(params):
        grad = 10.0 ** (number % 5 - 4) * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(left: AdamW8bit, right: torch.optim.Optimizer) -> None:
    """Both optimizers' parameters and states are equal to the bit; ``right`` may hold more entries."""
    for group, other_group in zip(left.param_groups, right.param_groups, strict=True):
        for param, other in zip(group["params"], other_group["params"], strict=True):
            assert torch.equal(param, other)
            for name, value in left.state[param].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right.state[other][name])), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_bitsandbytes(dtype: torch.dtype, weight_decay: float) -> None:
    oracle_class = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    shapes = tuple(shape for shape in SHAPES if 0 not in shape)  # bitsandbytes fails on empty tensors
    ours, theirs = make_params(dtype, shapes), make_params(dtype, shapes)
    settings = SETTINGS | {"weight_decay": weight_decay}
    optimizer, oracle = AdamW8bit(ours, **settings), oracle_class(theirs, **settings)
    run(optimizer, ours, range(22))
    run(oracle, theirs, range(22))
    assert_same(optimizer, oracle)
    sizes = {"absmax1" in optimizer.state[param]: param.numel() for param in ours}
    assert sizes.keys() == {True, False}


def test_groups_and_a_schedule_equal_bitsandbytes() -> None:
    oracle_class = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    results = []
    for kind in (AdamW8bit, oracle_class):
        params = make_params(shapes=((70, 70), (90, 90), (64,)))
        groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "lr": 1e-2}]
        optimizer = kind(groups, **SETTINGS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(6):
            set_grads(params, step)
            optimizer.step()
            schedule.step()
        results.append(optimizer)
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = AdamW8bit(params, **SETTINGS)
    run(optimizer, params, range(4))
    saved = through_file(optimizer.state_dict())
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    run(optimizer, params, range(4, 9))

    resumed = AdamW8bit(copies)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == SETTINGS["lr"]
    run(resumed, copies, range(4, 9))
    assert_same(optimizer, resumed)


def test_state_dict_is_torchs_form_and_loading_copies_it() -> None:
    params = make_params(shapes=((80, 80), (8,)))
    optimizer = AdamW8bit(params, **SETTINGS)
    run(optimizer, params, range(2))
    state_dict = optimizer.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}
    assert state_dict["state"][0].keys() == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert state_dict["state"][1].keys() == {"step", "state1", "state2"}
    assert state_dict["state"][0]["state1"].shape == (80, 80)
    before = copy.deepcopy(state_dict["state"])

    other_params = make_params(shapes=((80, 80), (8,)))
    other = AdamW8bit(other_params)
    other.load_state_dict(state_dict)
    run(other, other_params, range(2, 4))
    for number, state in before.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state_dict["state"][number][name]))


def test_loading_replaces_a_state_in_use() -> None:
    params = make_params(shapes=((80, 80), (8,)))
    optimizer = AdamW8bit(params, **SETTINGS)
    run(optimizer, params, range(2))
    saved = through_file(optimizer.state_dict())
    kept = [param.detach().clone() for param in params]
    run(optimizer, params, range(2, 4))
    expected = [param.detach().clone() for param in params]

    optimizer.load_state_dict(saved)
    for param, value in zip(params, kept, strict=True):
        param.data.copy_(value)
    run(optimizer, params, range(2, 4))
    assert all(torch.equal(param, value) for param, value in zip(params, expected, strict=True))


def test_a_copied_optimizer_continues() -> None:
    params = make_params(shapes=((80, 80), (8,)))
    optimizer = AdamW8bit(params, **SETTINGS)
    run(optimizer, params, range(2))
    twin = copy.deepcopy(optimizer)
    run(optimizer, params, range(2, 4))
    run(twin, twin.param_groups[0]["params"], range(2, 4))
    assert_same(optimizer, twin)


def test_parameters_without_gradient_are_skipped() -> None:
    shapes = ((70, 70), (67, 73), (80, 80), (9,), (10,))
    params = make_params(shapes=shapes)
    alone = make_params(shapes=shapes)
    together, separate = AdamW8bit(params, **SETTINGS), [AdamW8bit([param], **SETTINGS) for param in alone]
    absent = {0: {0, 3}, 2: {1}, 3: {1, 2, 4}, 5: {0, 1, 2, 3, 4}}
    for step in range(8):
        for group in (params, alone):
            set_grads(group, step)
            for number in absent.get(step, ()):
                group[number].grad = None
        together.step()
        for optimizer in separate:
            optimizer.step()
    assert [together.state[param]["step"] for param in params] == [6, 5, 6, 6, 6]
    assert all(torch.equal(left, right) for left, right in zip(params, alone, strict=True))


def test_strided_parameters_and_gradients() -> None:
    dense = make_params(shapes=((800, 700), (64, 80)))
    strided = [nn.Parameter(param.detach().t().contiguous().t()) for param in dense]
    optimizers = AdamW8bit(dense, **SETTINGS), AdamW8bit(strided, **SETTINGS)
    for step in range(3):
        set_grads(dense, step)
        for param, other in zip(dense, strided, strict=True):
            other.grad = param.grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert not strided[0].is_contiguous()
    assert_same(*optimizers)


def test_min_8bit_size_and_closure() -> None:
    param = nn.Parameter(torch.ones(300))
    optimizer = AdamW8bit([param], lr=0.1, min_8bit_size=300)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 300.0
    assert optimizer.step(closure).item() < 300.0
    assert optimizer.state[param]["state1"].dtype == torch.uint8
    assert optimizer.step() is None


def test_it_learns() -> None:
    target = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(torch.zeros(80, 80))
    optimizer = AdamW8bit([param], lr=0.05, weight_decay=0.0)
    for _ in range(200):
        param.grad = param.detach() - target
        optimizer.step()
    assert (param - target).abs().mean() < 0.02


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(100, 64, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        AdamW8bit(table.parameters()).step()


def test_foreign_states_are_refused() -> None:
    params = make_params(shapes=((80, 80),))
    foreign = torch.optim.AdamW(params)
    run(foreign, params, range(1))
    with pytest.raises(ConfigError, match="another optimizer"):
        AdamW8bit(params).load_state_dict(foreign.state_dict())
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    with pytest.raises(ConfigError, match="other parameters"):
        AdamW8bit(make_params(shapes=((80, 81),))).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("setting", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}])
def test_impossible_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        AdamW8bit(make_params(), **setting)
