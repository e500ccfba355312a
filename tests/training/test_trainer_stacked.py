"""``SFTTrainer`` with layers laid together as on a card, here on a CPU: trainings are those of layers that are not.

Tolerances are of float32 sums in another order, after a few steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.plan.passes import PassPlan
from jebi.training import engine, trainer
from jebi.training.engine import lay_together, make_plan

Fixture = Callable[..., Any]


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """``stacked(whether)``: lay layers together from now on, or no more."""

    def planned(model: JebiForCausalLM, settings: Any) -> PassPlan:
        plan = make_plan(model, settings)
        lay_together(model, plan)
        return plan

    return lambda whether: monkeypatch.setattr(trainer, "make_plan", planned if whether else make_plan)


def laid(model: JebiForCausalLM) -> set[bool]:
    return {layer.stacked is not None for layer in model.model.decoder_layers()}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "adafactor", "lion_8bit"])
def test_every_optimizers_steps_are_seen(
    optim: str, make_trainer: Fixture, stacked: Fixture, losses: Fixture, rows: Dataset
) -> None:
    """Fused optimizers and bitsandbytes' write into parameters without raising their versions."""
    curves = []
    for whether in (False, True):
        stacked(whether)
        settings = {"max_steps": 4, "optim": optim, "eval_strategy": "steps", "eval_steps": 4}
        trained = make_trainer(**settings, trainer={"eval_dataset": rows})
        trained.train()
        curves.append(
            [*losses(trained), *(log["eval_loss"] for log in trained.state.log_history if "eval_loss" in log)]
        )
    assert len(curves[0]) == 5, "the last is evaluated with what the last step left"
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_steps_of_an_optimizer_that_was_given_are_seen(
    make_trainer: Fixture, make_model: Fixture, stacked: Fixture, losses: Fixture
) -> None:
    curves = []
    for whether in (False, True):
        stacked(whether)
        model = make_model()
        given = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True), None
        trained = make_trainer(model, max_steps=3, trainer={"optimizers": given})
        trained.train()
        curves.append(losses(trained))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


class Answer(TrainerCallback):
    """Makes the model ready for answers after the second step, and for training again."""

    def __init__(self) -> None:
        self.laid: list[set[bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.laid.append(laid(model))
        if state.global_step == 2:
            FastLanguageModel.for_training(FastLanguageModel.for_inference(model))


def test_layers_that_a_callback_took_apart_are_laid_together_again(
    make_trainer: Fixture, stacked: Fixture, losses: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With graphs anew: those before read weights and casts that are gone."""
    asked = []
    monkeypatch.setattr(engine.PassGraphs, "hindrance", lambda model: f"asked, {asked.append(laid(model))}")
    plain, answering, callback = make_trainer(max_steps=4), None, Answer()
    plain.train()
    asked.clear()
    stacked(True)
    answering = make_trainer(max_steps=4, trainer={"callbacks": [callback]})
    answering.train()
    assert callback.laid == [{True}] * 4
    assert asked == [{True}, {True}], "once at the start, once more at the third step"
    assert losses(answering) == pytest.approx(losses(plain), rel=1e-4)


def test_layers_are_taken_apart_afterwards(make_trainer: Fixture, stacked: Fixture, rows: Dataset) -> None:
    """Another trainer's fused optimizer would not be seen, and a second plan would miss the memory."""
    stacked(True)
    trained = make_trainer(max_steps=1, trainer={"eval_dataset": rows})
    for run in (trained.evaluate, trained.train, trained.evaluate, trained.train):
        run()
        assert laid(trained.model) == {False}
        assert not hasattr(trained, "_engine")
