"""``training.planning``: predictions of a loaded model, and the budget a training is kept to."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from jebi.config import LoraConfig
from jebi.errors import OutOfMemoryError
from jebi.models.hf import JebiForCausalLM
from jebi.plan.inventory import CONTEXT_BYTES, model_items, total
from jebi.training import budget, engine
from jebi.training.budget import allowed_bytes, within
from jebi.training.engine import make_plan
from jebi.training.pass_settings import Settings
from jebi.training.planning import held_of

CPU = torch.device("cpu")


def test_a_loaded_model_is_what_it_was_loaded_as(make_model: Callable[..., JebiForCausalLM]) -> None:
    model = make_model()
    held = held_of(model, "adamw_8bit")
    assert held.shape == model.model.shape
    assert isinstance(held.lora, LoraConfig)
    assert not held.on_card
    assert sorted(held.matrices) == sorted(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert total(model_items(held)) == sum(p.numel() * p.element_size() for p in frozen)


def test_the_prediction_is_told_and_reported(
    make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(max_steps=1)
    with caplog.at_level(logging.DEBUG, logger="jebi.training.planning"):
        trainer.train()
    assert "Plan: 0." in caplog.text
    assert "gradients (float32) (adapter, card)" in caplog.text
    predicted = trainer.report.predicted
    assert predicted["peak_gb"] == pytest.approx(sum(predicted["parts_gb"].values()))
    assert "Predicted peak reserved memory" in trainer.report.text()


def test_a_budget_is_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    total_memory = psutil.virtual_memory().total
    monkeypatch.setattr(budget, "free_bytes", lambda device: total_memory)
    held = psutil.Process().memory_info().rss
    assert allowed_bytes(CPU, None) == total_memory
    assert allowed_bytes(CPU, 0.5) == pytest.approx(total_memory // 2 - held, rel=0.01)
    monkeypatch.setattr(budget, "free_bytes", lambda device: 1000)
    assert allowed_bytes(CPU, 0.5) == 1000


def test_a_budget_too_small_is_told_before_a_step(
    make_model: Callable[..., JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "allowed_bytes", lambda device, budget: 2**20)
    with pytest.raises(
        OutOfMemoryError, match=r"memory_budget '1MB' does not hold a row of 128 tokens: .* raise it to"
    ):
        make_plan(make_model(), Settings(128, None, False, False, 0.0, False, budget="1MB"))
    assert not make_plan(make_model(), Settings(128, None, False, False, 0.0, False)).fits, "only a budget is a promise"


def test_on_a_card_the_allocator_is_kept_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of a budget is the context's; what was allowed before is allowed again."""
    shares: list[float] = [1.0]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    card = torch.device("cuda")
    with within(card, "16GB"):
        left = (16 - CONTEXT_BYTES / 2**30) / 100
        assert shares[-1] == pytest.approx(left)
        with within(card, None), within(card, 0.5):
            assert shares[-1] == pytest.approx(left), "never more than was allowed"
    assert shares[-1] == 1.0
    with within(CPU, "16GB"):
        assert shares[-1] == 1.0
