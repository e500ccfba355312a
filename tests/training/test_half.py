"""Training in float16 with a scaled loss, on the CPU: accelerate's own way, with a scaler it makes only on a card."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jebi.models.hf import JebiForCausalLM
from jebi.training.half import exact_sums
from jebi.training.trainer import SFTTrainer

Fixture = Callable[..., Any]
RUN: dict[str, Any] = {"max_steps": 8, "learning_rate": 2e-3, "lr_scheduler_type": "linear", "weight_decay": 0.0}


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[SFTTrainer, float], SFTTrainer]:
    """``scaled(trainer, scale)``: the trainer with what accelerate sets up for fp16=True on a card, from this scale."""

    def set_up(trainer: SFTTrainer, scale: float) -> SFTTrainer:
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.native_amp = True
        monkeypatch.setitem(vars(accelerator.state), "_mixed_precision", "fp16")
        return trainer

    return set_up


def rates(trainer: SFTTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_scaled_run_is_the_run_in_float32(
    make_trainer: Fixture, make_model: Fixture, scaled: Fixture, losses: Fixture
) -> None:
    exact, half = make_trainer(**RUN), scaled(make_trainer(make_model(dtype=torch.float16), **RUN), 2.0**12)
    exact.train()
    half.train()
    # Eight steps of 2e-3 with gradients that are off by 1e-3 or so, and losses of about 6 summed from float16's logits
    # (2**-11 of each): measured 7e-5. A loss that were still scaled would be 4,096 times as large.
    assert losses(half) == pytest.approx(losses(exact), rel=5e-4)
    assert half.accelerator.scaler.get_scale() == 2.0**12
    assert rates(half) == rates(exact)


def test_gradients_that_overflow_skip_their_step_and_no_more(
    make_trainer: Fixture,
    make_model: Fixture,
    scaled: Fixture,
    losses: Fixture,
    snapshot: Fixture,
    assert_equal: Fixture,
) -> None:
    model = make_model(dtype=torch.float16)
    trainer = scaled(make_trainer(model, **(RUN | {"max_steps": 14})), 2.0**24)
    seen: list[dict[str, Tensor]] = []
    inner = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(snapshot(model))
        return inner(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    skipped = 24 - torch.tensor(trainer.accelerator.scaler.get_scale()).log2().item()
    first = sum(all(torch.equal(seen[0][name], value) for name, value in before.items()) for before in seen[1:])
    assert 1 <= first <= skipped <= 12
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert losses(trainer)[-1] < losses(trainer)[0]
    # The schedule waits for steps that are made.
    assert rates(trainer)[: first + 1] == [2e-3] * (first + 1)
    assert rates(trainer)[-1] == pytest.approx(2e-3 * (skipped + 1) / 14)


def test_a_run_with_a_scale_resumes_to_the_bit(
    make_trainer: Fixture,
    make_model: Fixture,
    scaled: Fixture,
    losses: Fixture,
    snapshot: Fixture,
    assert_equal: Fixture,
) -> None:
    settings = RUN | {"save_strategy": "steps", "save_steps": 6}
    whole = make_model(dtype=torch.float16)
    trainer = scaled(make_trainer(whole, **settings), 2.0**24)
    trainer.train()
    again = make_model(dtype=torch.float16)
    resumed = scaled(make_trainer(again, **settings), 1.0)
    resumed.train(resume_from_checkpoint=str(trainer.args.output_dir) + "/checkpoint-6")
    assert_equal(snapshot(again), snapshot(whole))
    assert losses(resumed) == losses(trainer)
    assert resumed.accelerator.scaler.get_scale() == trainer.accelerator.scaler.get_scale()


def test_massive_activations_train(
    make_trainer: Fixture, make_model: Fixture, scaled: Fixture, losses: Fixture
) -> None:
    """One channel of ``act * up`` at 100,000 and more: float16 says what float32 says."""

    def massive(dtype: torch.dtype) -> JebiForCausalLM:
        model = make_model(dtype=dtype)
        layer = model.model.layers[0]
        with torch.no_grad():
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[3] *= 300
        return model

    exact, half = (
        make_trainer(massive(torch.float32), **RUN),
        scaled(make_trainer(massive(torch.float16), **RUN), 2.0**8),
    )
    model, seen = half.model, []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max().item()))
    model.model.plain = True  # the hand-written layers call no module
    with torch.no_grad():
        model(torch.arange(20)[None])
    model.model.plain = False
    assert max(seen) / model.model.layers[0].scale > 65_504
    exact.train()
    half.train()
    # As above; what the massive channel drowns is lost to both, to float16 8,192 times as much.
    assert losses(half) == pytest.approx(losses(exact), rel=1e-2)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_exact_within_a_training_alone(dtype: torch.dtype, before: bool) -> None:
    matmul = torch.backends.cuda.matmul
    found = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = before
    try:
        with exact_sums(dtype):
            assert matmul.allow_fp16_reduced_precision_reduction == (before and dtype != torch.float16)
        with pytest.raises(KeyError), exact_sums(dtype):
            raise KeyError
        assert matmul.allow_fp16_reduced_precision_reduction == before
    finally:
        matmul.allow_fp16_reduced_precision_reduction = found
