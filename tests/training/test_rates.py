"""``training.rates`` and ``jebi bench device``: measured on this processor, told, and kept where plans look."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jebi.plan.measured import kept, processor_name
from jebi.training.rates import measure, seconds

CPU = torch.device("cpu")


def test_a_processor_has_products_attention_and_memory() -> None:
    rates = measure(CPU, least=0.01)
    assert rates.device == processor_name()
    assert rates.fp8 is rates.to_device is rates.from_device is None
    # No processor reaches a thousandth or the thousandfold of these.
    for rate, usual in ((rates.products, 1e12), (rates.attention, 1e11), (rates.bandwidth, 2e10)):
        assert usual / 1000 < rate < usual * 1000


def test_a_calls_time_is_the_mean_of_enough_calls() -> None:
    took = []

    def run() -> None:
        began = time.perf_counter()
        time.sleep(0.002)
        took.append(time.perf_counter() - began)

    # As long as a call took by its own clock; on a busy machine that is more than it slept.
    assert seconds(run, CPU, least=0.05) == pytest.approx(statistics.mean(took), rel=0.25)
    assert sum(took) > 0.05


def test_the_command_tells_and_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "jebi", "bench", "device"], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 60  # 4 s on two idle cores
    assert done.stdout.startswith(processor_name())
    assert all(word in done.stdout for word in ("products", "attention", "memory", "TFLOP/s", "GB/s"))
    found = kept(processor_name())
    assert found is not None
    assert found.seconds < 30
    assert str(tmp_path) in done.stderr


def test_programs_get_it_in_units_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [sys.executable, "-m", "jebi", "bench", "device", "--json", "--no-keep"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["products"] > 1e9
    assert not list(tmp_path.iterdir())
