"""``plan.refusal``: what does not fit is refused before a weight is read, with what would fit."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jebi.config import Places, RunConfig, run_from_dict
from jebi.config.launched import World
from jebi.config.reading import apply_settings
from jebi.errors import OutOfMemoryError
from jebi.fast import FastLanguageModel
from jebi.models.sizes import read_sizes
from jebi.plan import present, refusal
from jebi.plan.inventory import GIB
from jebi.plan.refusal import Loading, require_model, require_run
from jebi.run import train

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
LLAMA_8B = read_sizes("llama-3.1-8b").shape


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``free(gigabytes)``: so much memory is free here."""

    def set_free(size: float) -> None:
        for module in (refusal, present):
            monkeypatch.setattr(module, "free_bytes", lambda device: int(size * GIB))

    return set_free


def loading(**changes: Any) -> Loading:
    settings: dict[str, Any] = {
        "name": "eight", "shape": LLAMA_8B, "storage": "dense", "dtype": torch.bfloat16, "places": Places(),
        "max_seq_length": 2048,
    }  # fmt: skip
    return Loading(**(settings | changes))


def test_weights_that_do_not_fit_are_refused_with_what_would(free: Callable[[float], None]) -> None:
    free(9)
    with pytest.raises(OutOfMemoryError) as caught:
        require_model(loading(), CPU)
    found = re.fullmatch(
        r"'eight' does not fit this machine: its weights take 15\.0 GB and 9\.0 GB are free, 6\.0 GB too little\. "
        r"It would fit with load_in_8bit=True \(8\.\d GB\) or load_in_4bit=True \(5\.\d GB\)\.",
        str(caught.value),
    )
    assert found
    assert isinstance(caught.value, MemoryError)
    free(2)
    with pytest.raises(OutOfMemoryError, match=r"No setting makes it fit: .* \(jebi plan eight --all-gpus\)"):
        require_model(loading(storage="nf4"), CPU)
    free(16)
    require_model(loading(), CPU)


def test_a_model_that_is_divided_is_held_in_parts(free: Callable[[float], None]) -> None:
    """8B in 16 bits has 13.0 GB of layers and 2.0 of tables: in two parts 6.5 + 3 of 32 layers (1.2) + 2.0."""
    free(12)
    with pytest.raises(OutOfMemoryError, match="its weights take 15"):
        require_model(loading(world=World(2, 2)), CPU)
    require_model(loading(world=World(2, 2, shard=True)), CPU)
    free(9)
    with pytest.raises(OutOfMemoryError, match=r"its weights take 9\.7 GB"):
        require_model(loading(world=World(2, 2, shard=True)), CPU)


def test_what_a_card_does_not_hold_and_several_would(
    free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "named", lambda device: "a card")
    free(12)
    says = r"load_in_4bit=True \(\d\.\d GB\), or over 2 such cards that divide its layers \(jebi plan eight --gpus 2 --"
    with pytest.raises(OutOfMemoryError, match=says):
        require_model(loading(places=Places("card", "card")), torch.device("cuda"))


def test_a_run_is_counted_by_process(free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many processes as a launcher says there are, on a machine of so many."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked: list[World] = []
    monkeypatch.setattr(refusal, "predict", lambda job, *_: asked.append(job.held.world) or SimpleNamespace(fits=True))
    require_run(demo("model.shard=true"))
    require_run(demo())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    require_run(demo("model.shard=true"))
    assert [world.shares for world in asked] == [2, 1, 1]


def test_a_model_that_fits_and_cannot_be_trained_is_told(
    free: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    free(100)
    require_model(loading(storage="masters"), torch.device("cpu"))
    assert not caplog.text
    free(40)
    require_model(loading(storage="masters"), CPU)
    assert "the model fits, but training it does not: it takes" in caplog.text
    assert "It would fit with full_finetuning=False, load_in_4bit=True (" in caplog.text


def test_nothing_is_read_of_what_does_not_fit(
    free: Callable[[float], None], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jebi.fast.load_model", lambda *_: pytest.fail("weights were read"))
    free(0.00001)
    with pytest.raises(OutOfMemoryError, match="does not fit"):
        FastLanguageModel.from_pretrained(str(tiny_folder), 128, device="cpu")


def demo(*settings: str) -> RunConfig:
    sections = {"data": {"train": str(ROOT / "examples" / "data" / "train.jsonl")}, "model": {"name": "smollm2"}}
    return run_from_dict(apply_settings(sections, list(settings)))


def test_a_run_that_does_not_fit_is_refused_before_it_is_loaded(
    free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With settings that would fit, as ``--set`` takes them; and with these it goes on."""
    monkeypatch.setattr("jebi.run._load", lambda config: pytest.fail("it was loaded"))
    monkeypatch.setattr(present.psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=0))
    free(2.0)
    dear = ["model.full_finetuning=true", "model.dtype=float32", f"train.output_dir={tmp_path}"]
    with pytest.raises(OutOfMemoryError, match="this run does not fit: it takes") as caught:
        train(demo(*dear), [])
    settings = re.search(r"with ((--set \S+ ?)+) \(", str(caught.value))
    assert settings, caught.value
    require_run(demo(*dear, *settings[1].replace("--set ", "").split()))


def test_a_run_within_its_budget_is_not_refused(free: Callable[[float], None]) -> None:
    free(64)
    require_run(demo())
    with pytest.raises(OutOfMemoryError, match=r"has 0\.5 GB for it"):
        require_run(demo("train.memory_budget=0.5GB"))


def test_for_kernels_that_onednn_may_keep_nothing_is_refused(
    free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are known of one model and processor: 2.6 GB of 64 sizes in 16 bits, beside 1.4 GB of everything else."""
    monkeypatch.setattr(present.psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=0))
    run = demo("model.dtype=bfloat16", "train.max_steps=64")
    free(8)
    require_run(run)
    assert not caplog.text
    free(2.2)
    require_run(run)
    assert "this run may not fit: it takes" in caplog.text
    free(0.7)
    with pytest.raises(OutOfMemoryError, match="this run does not fit"):
        require_run(run)
