"""``training.engine``: the model is set up as the plan chooses; embedding and head leave the card last."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from jebi.config import Places
from jebi.config.limits import CHUNK_BYTES, CHUNK_TOKENS, SLICE_BYTES
from jebi.models import placement
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import place, placed, resolve
from jebi.plan.activations import kept_bytes_per_token, loss_bytes, work_bytes
from jebi.plan.inventory import SLACK_BYTES, trained
from jebi.plan.passes import Room
from jebi.plan.places import Relief
from jebi.training import engine
from jebi.training.engine import make_plan
from jebi.training.pass_settings import Settings
from jebi.training.planning import job_of

SETTINGS = Settings(128, None, False, False, 0.0, False)
TABLE = 4 * 2**20


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., JebiForCausalLM]) -> Callable[..., Any]:
    """``planned(lacking)``: the plan of a card on which recomputing lacks so many bytes, and the model.

    The tables are counted as large ones; the model lies on the CPU, which counts as a card.
    """
    monkeypatch.setattr(engine, "CPU_PASS_TOKENS", 1024)
    for module in (engine, placement):
        monkeypatch.setattr(module, "resolve", lambda places, tied, device: resolve(places, tied, torch.device("cuda")))
    found = make_model()
    options = [Relief(Places(), 0), Relief(Places("host", "host"), TABLE, 10**9)]
    monkeypatch.setattr(engine, "_reliefs", lambda model: options)

    def plan(lacking: int) -> Any:
        shape = found.model.shape
        least = SETTINGS.longest
        activations = least * kept_bytes_per_token(shape, 4, "recompute")
        work = work_bytes(shape, 4, "recompute", least, CHUNK_TOKENS, on_card=False)
        activations += max(work, loss_bytes(shape, 4, least, on_card=False))
        sizes = [p.numel() for p in found.parameters() if p.requires_grad]
        used = Room(2**30, on_card=False).usable / 2**30
        needed = activations / used + trained(sizes, SETTINGS.optimizer).bytes
        # What was moved already is free already.
        # And slices are in a table's stead, beside what moving it frees.
        moved = TABLE + 2 * (SLICE_BYTES + CHUNK_BYTES) if placed(found) == Places("host", "host") else 0
        monkeypatch.setattr(engine, "allowed_bytes", lambda device, budget: int(needed) + 8 - lacking + moved)
        return make_plan(found, SETTINGS), found

    return plan


def test_tables_stay_while_anything_else_helps(planned: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    plan, model = planned(0)
    assert plan.fits
    assert plan.checkpointing == model.model.checkpointing == "recompute"
    assert placed(model) == Places("card", "card")
    assert not caplog.text


def test_tables_leave_where_nothing_else_fits(planned: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    plan, model = planned(2**20)
    assert plan.fits
    assert placed(model) == Places("host", "host")
    assert "training needs the room on the card, so: embedding='host', head='host'" in caplog.text
    again, _ = planned(2**20)
    assert again == plan, "their room is counted once"
    back, _ = planned(0)
    assert placed(model) == Places("card", "card")
    assert back.fits


def test_where_even_that_does_not_fit_it_has_the_most_room(
    planned: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    plan, model = planned(2 * TABLE)
    assert not plan.fits
    assert re.search(r"rows of 128 tokens may not fit: it takes .* GB too little\.", caplog.text)
    assert placed(model) == Places("host", "host")


def test_the_room_is_what_is_left_of_all_that_adapters_take(
    make_model: Callable[..., JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    monkeypatch.setattr(engine, "allowed_bytes", lambda device, budget: 2**30)
    held = dataclasses.replace(job_of(model, SETTINGS).held, on_card=True)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    taken = trained(sizes, SETTINGS.optimizer).bytes + held.cast_bytes + SLACK_BYTES
    assert held.cast_bytes > 0
    assert engine._room(model, SETTINGS, held).card == 2**30 - taken


def test_a_cpu_has_nothing_to_be_relieved_of(make_model: Callable[..., JebiForCausalLM]) -> None:
    model = make_model()
    assert engine._reliefs(model) == [Relief(Places(), 0)]
    assert make_plan(model, SETTINGS).fits
    assert placed(model) == Places("card", "card")


def test_training_from_host_memory_is_the_training(
    make_trainer: Callable[..., Any],
    make_model: Callable[..., JebiForCausalLM],
    losses: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its losses differ by roundings, which two epochs of Adam do not blow up."""
    curves = []
    for moved in (False, True):
        model = make_model()
        if moved:
            with monkeypatch.context() as patch:
                patch.setattr(placement, "resolve", lambda *_: Places("host", "host"))
                place(model, Places("host", "host"))
            monkeypatch.setattr(engine, "place", lambda *_: None)
        trainer = make_trainer(model=model, num_train_epochs=2)
        trainer.train()
        curves.append(losses(trainer))
        assert trainer.report.plan["head"] == ("host" if moved else "card")
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
