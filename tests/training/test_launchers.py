"""Under torchrun: two machines' processes meet and train as one; a killed process ends the job, its checkpoints whole.

Both "machines" are this one, each with a torchrun of its own, as on two nodes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

CONFIG = """
model: {{name: {model}, max_seq_length: 128, dtype: float32}}
lora: {{r: 4}}
data: {{train: {rows}, text_field: text}}
train:
  output_dir: {output}
  per_device_train_batch_size: 2
  max_steps: {steps}
  learning_rate: 0.01
  save_strategy: steps
  save_steps: 2
  use_cpu: true
  disable_tqdm: true
"""


def write_config(folder: Path, model: Path, steps: int) -> Path:
    rows = folder / "rows.jsonl"
    texts = ["".join("abcdefgh "[(seed * 7 + n * n) % 9] for n in range(10 + seed % 20)) + "</s>" for seed in range(24)]
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(model=model, rows=rows, output=folder / "out", steps=steps), encoding="utf-8")
    return path


def torchrun(config: Path, log: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "jebi", "train", str(config)]
    # gloo asks for this machine's name otherwise, which not every machine can resolve.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Launchers that are gone after the test, whatever became of it."""
    launchers: list[subprocess.Popen[bytes]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(60)


def test_two_machines_train_as_one(tiny_folder: Path, tmp_path: Path, ended: list[subprocess.Popen[bytes]]) -> None:
    config = write_config(tmp_path, tiny_folder, steps=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for node in range(2):
        meeting = ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--rdzv-id", "job")
        where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1")
        ended.append(torchrun(config, tmp_path / f"node-{node}", *meeting, *where))
    logs = [(tmp_path / f"node-{node}") for node in range(2)]
    for launcher in ended:
        # Where one machine fails, the other says no more than that it lost it.
        assert launcher.wait(120) == 0, "\n".join(log.read_text()[-4000:] for log in logs)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 3
    assert len(report["ranks"]) == 2
    assert sum(rank["tokens"] for rank in report["ranks"]) == report["tokens"]
    text = logs[0].read_text() + logs[1].read_text()
    assert text.count("Adapter and report.json are in") == 1, "one process of all speaks"
    assert "Process 1: " in text


def test_a_killed_process_ends_the_job(tiny_folder: Path, tmp_path: Path, ended: list[subprocess.Popen[bytes]]) -> None:
    config, out = write_config(tmp_path, tiny_folder, steps=100_000), tmp_path / "out"
    ended.append(launcher := torchrun(config, tmp_path / "log", "--standalone", "--nproc-per-node", "2"))
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-2").is_dir():
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    begun = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - begun < 60
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    text = (tmp_path / "log").read_text()
    assert "SIGKILL" in text, "torchrun says what happened"
    whole = sorted(entry for entry in out.iterdir() if entry.name.startswith("checkpoint-"))
    assert whole
    for checkpoint in whole:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        assert state["global_step"] == int(checkpoint.name.removeprefix("checkpoint-"))
        assert load_file(checkpoint / "adapter_model.safetensors")
        assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
