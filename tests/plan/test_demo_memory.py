"""The demo on this processor, in a process of its own: what was predicted beside what was resident."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_predicted_memory_is_within_a_tenth_of_the_demos(tmp_path: Path) -> None:
    """In float32, whose products are the same on every processor; by `jebi plan` beforehand and by the trainer."""
    settings = [f"train.output_dir={tmp_path}", "train.max_steps=4", "model.dtype=float32", "train.use_cpu=true"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "jebi", "train", "examples/demo.yaml", *options]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["predicted"]["peak_gb"] == pytest.approx(report["peak_gb"], rel=0.1)
    command = [sys.executable, "-m", "jebi", "plan", "--config", "examples/demo.yaml", "--json", *options]
    planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    if planned["gpu"] == "cpu":
        assert planned["peak"] / 2**30 == pytest.approx(report["peak_gb"], rel=0.1)
