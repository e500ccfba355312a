"""``training.report``: the tutorial's figures before and after a run, as text and as a file, from real memory."""

import dataclasses
import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from jebi.training import report
from jebi.training.report import MemoryBefore, Meter, Report, memory_before

CPU = torch.device("cpu")
BEFORE = MemoryBefore("Tesla T4", 14.748, 5.984)
DONE = Report(BEFORE, 470.5, 6.732, 60, 107_232, {"pass_tokens": 4096, "checkpointing": "recompute"})


def test_the_figures_follow_from_each_other() -> None:
    assert DONE.minutes == pytest.approx(7.8417, abs=5e-5)
    assert DONE.training_gb == pytest.approx(0.748)
    assert DONE.peak_percent == pytest.approx(100 * 6.732 / 14.748)
    assert DONE.training_percent == pytest.approx(100 * 0.748 / 14.748)
    assert DONE.tokens_per_second == pytest.approx(107_232 / 470.5)


def test_nothing_done_is_no_division_by_zero() -> None:
    assert Report(BEFORE, 0.0, 5.984, 0, 0, {}).tokens_per_second == 0.0


def test_the_text_is_the_tutorials() -> None:
    assert BEFORE.text() == "Device = Tesla T4. Max memory = 14.748 GB.\n5.984 GB of memory reserved."
    assert DONE.text().splitlines() == [
        "470.5 seconds used for training.",
        "7.84 minutes used for training.",
        "228 tokens a second (107,232 tokens, 60 steps).",
        "Peak reserved memory = 6.732 GB.",
        "Peak reserved memory for training = 0.748 GB.",
        "Peak reserved memory % of max memory = 45.647 %.",
        "Peak reserved memory for training % of max memory = 5.072 %.",
    ]


def test_what_was_predicted_stands_beside_it() -> None:
    told = dataclasses.replace(DONE, predicted={"peak_gb": 6.5}).text().splitlines()
    assert told[:-1] == DONE.text().splitlines()
    assert told[-1] == "Predicted peak reserved memory = 6.500 GB."
    timed = dataclasses.replace(DONE, predicted={"peak_gb": 6.5, "step_seconds": 7.5}, step_seconds=7.841).text()
    assert timed.splitlines()[-1] == "A step took 7.841 s; predicted were 7.500 s."
    assert dataclasses.replace(DONE, step_seconds=7.841).text().endswith("\nA step took 7.841 s.")


def test_a_step_is_timed_by_the_median_of_those_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 20.0, 21.0, 22.0, 30.0, 31.0, 32.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(moments))
    meter = Meter(CPU)
    for _ in range(7):
        meter.step()
    assert meter.report(7, 0, {}, {}).step_seconds == 1.0


def test_the_file_holds_the_figures_and_the_loss_curve(tmp_path: Path) -> None:
    log = [{"loss": 2.5, "step": 1}, {"train_runtime": 3.0, "step": 1}]
    DONE.write(tmp_path / "report.json", log)
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "before": {"device": "Tesla T4", "total_gb": 14.748, "reserved_gb": 5.984},
        "seconds": 470.5,
        "peak_gb": 6.732,
        "steps": 60,
        "tokens": 107_232,
        "plan": {"pass_tokens": 4096, "checkpointing": "recompute"},
        "ranks": [],
        "predicted": {},
        "step_seconds": None,
        "minutes": DONE.minutes,
        "training_gb": DONE.training_gb,
        "peak_percent": DONE.peak_percent,
        "training_percent": DONE.training_percent,
        "tokens_per_second": DONE.tokens_per_second,
        "log": log,
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"], "nothing half-written is left"


def test_the_host_is_described_where_there_is_no_card() -> None:
    before = memory_before(CPU)
    assert before.device.endswith("threads")
    assert 0.05 < before.reserved_gb < before.total_gb


def test_the_peak_is_the_highest_point_of_the_run() -> None:
    """What is allocated and freed again within the run counts; what came before it does not, where Linux lets it."""
    meter = Meter(CPU)
    with mmap.mmap(-1, 48 * 2**20) as held:  # fresh pages, where an allocator might have some in hand
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    peak = meter.report(1, 1, {}, {})
    assert peak.peak_gb >= peak.before.reserved_gb
    assert peak.training_gb >= 44 / 1024  # Linux counts a process's pages in batches
    quiet = Meter(CPU).report(0, 0, {}, {})
    assert quiet.peak_gb >= quiet.before.reserved_gb
    if _can_reset():
        assert quiet.peak_gb < peak.peak_gb - 40 / 1024


def _can_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def test_without_the_right_to_reset_the_peak_is_the_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == "clear_refs":
            raise PermissionError(13, "Permission denied")
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", refuse)
    done = Meter(CPU).report(0, 0, {}, {})
    assert done.peak_gb >= done.before.reserved_gb


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    before = memory_before(CPU)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert report._peak_bytes(CPU) / 2**30 >= 0.9 * before.reserved_gb  # ru_maxrss is kept in steps
    assert memory_before(CPU).device.endswith("threads")
