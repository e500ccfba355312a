"""``training.room``: rows that do not fit beside a loaded model are refused, and those that may not warned of."""

import logging
from collections.abc import Callable

import pytest

from jebi.errors import OutOfMemoryError
from jebi.models.hf import JebiForCausalLM
from jebi.training.engine import make_plan
from jebi.training.pass_settings import Settings


def test_rows_that_surely_do_not_fit_are_refused_and_others_warned_of(
    make_model: Callable[..., JebiForCausalLM], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth of the peak may be the prediction's fault: 0.07 of the 0.7 GB that a process takes."""
    model, settings = make_model(), Settings(100_000, None, False, False, 0.0, False, batch=1)
    monkeypatch.setattr("jebi.training.engine.allowed_bytes", lambda device, budget: 2**26)
    with pytest.raises(OutOfMemoryError, match=r"rows of 100000 tokens do not fit: .* max_seq_length=\d+"):
        make_plan(model, settings)
    monkeypatch.setattr("jebi.training.engine.allowed_bytes", lambda device, budget: 2**20)
    with caplog.at_level(logging.WARNING):
        assert not make_plan(model, Settings(128, None, False, False, 0.0, False, batch=1)).fits
    assert "rows of 128 tokens may not fit" in caplog.text
