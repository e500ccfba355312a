"""``SFTTrainer`` with layers laid together as on a card, here on a CPU: trainings are those of layers that are not.

Tolerances are of float32 sums in another order, after a few steps.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

Fixture = Callable[..., Any]


class Stack(TrainerCallback):
    """Lays the layers together when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model.model.stack(keep=True)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "adafactor", "lion_8bit"])
def test_every_optimizers_steps_are_seen(optim: str, make_trainer: Fixture, losses: Fixture, rows: Any) -> None:
    """Fused optimizers and bitsandbytes' write into parameters without raising their versions."""
    settings = {"max_steps": 4, "optim": optim, "eval_strategy": "steps", "eval_steps": 4}
    plain = make_trainer(**settings, trainer={"eval_dataset": rows})
    stacked = make_trainer(**settings, trainer={"eval_dataset": rows, "callbacks": [Stack()]})
    plain.train()
    stacked.train()
    assert losses(stacked) == pytest.approx(losses(plain), rel=1e-4)
    final = [trainer.state.log_history[-2]["eval_loss"] for trainer in (plain, stacked)]
    assert final[1] == pytest.approx(final[0], rel=1e-4), "evaluated with what the last step left"


def test_steps_of_an_optimizer_that_was_given_are_seen(
    make_trainer: Fixture, make_model: Fixture, losses: Fixture
) -> None:
    def trained(*callbacks: TrainerCallback) -> list[float]:
        model = make_model()
        adapter = [p for p in model.parameters() if p.requires_grad]
        given = torch.optim.AdamW(adapter, lr=1e-2, fused=True), None
        trainer = make_trainer(model, max_steps=3, trainer={"optimizers": given, "callbacks": [*callbacks]})
        trainer.train()
        return losses(trainer)

    assert trained(Stack()) == pytest.approx(trained(), rel=1e-4)
