"""``accelerate launch`` with two processes: `SFTTrainer` makes the adapter that one process makes of the same rows.

The processes run on the CPU (gloo), under the launcher that starts one a card.
"""

import json
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("train_on_ranks.py")

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 2,
    "pass_tokens": 64,  # several passes a step, not always as many in both processes
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

ROUNDING = 1e-5
"""Bar for adapters after 4 steps of Adam whose float32 gradients are summed in another order. Measured 3.3e-7."""
LOSS = 1e-6
"""Bar for losses of about 6 in float32."""

Fixture = Callable[..., Any]
Run = tuple[dict[str, Any], dict[str, Tensor]]


def texts(count: int, seed: int) -> list[str]:
    """Rows of 9 to 61 tokens, half of them with a beginning in common."""
    chance = random.Random(seed)
    made = ["".join(chance.choices("abcdefgh ", k=chance.randint(8, 40))) for _ in range(count)]
    return [("### a template:\n" if number % 2 else "") + text + "</s>" for number, text in enumerate(made)]


def write_run(folder: Path, name: str, model: Path, start: Path, batch: int) -> Path:
    """A run of 32 rows at 8 a step, with 5 held-out rows, which two processes cannot share evenly."""
    settings = SETTINGS | {"output_dir": str(folder / name), "per_device_train_batch_size": batch}
    settings["per_device_eval_batch_size"] = 2
    settings["script"] = {
        "model": str(model),
        "start": str(start),
        "load_in_4bit": True,
        "rows": texts(32, seed=0),
        "heldout": texts(5, seed=1),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def read_rank(folder: Path, rank: int) -> Run:
    known = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
    return known, load_file(folder / f"rank-{rank}.safetensors")


def launch(run: Path) -> None:
    """``accelerate launch`` with two processes; port 0 takes a free one."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *(str(SCRIPT), str(run)),
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Output folders of the same run in one process and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    runpy.run_path(str(SCRIPT))["main"](write_run(folder, "one", tiny_folder, start, batch=4))
    (folder / "two" / ".partial" / "checkpoint-1").mkdir(parents=True)  # what a killed run left
    launch(write_run(folder, "two", tiny_folder, start, batch=2))
    return folder / "one", folder / "two"


def test_two_processes_make_the_adapter_of_one(runs: tuple[Path, Path], assert_close: Fixture) -> None:
    known, adapter = read_rank(runs[0], 0)
    assert known["ranks"] == 1
    assert len(known["losses"]) == 4
    for rank in (0, 1):
        also_known, same = read_rank(runs[1], rank)
        assert also_known["ranks"] == 2
        assert also_known["losses"] == pytest.approx(known["losses"], rel=LOSS)
        assert also_known["tokens"] == known["tokens"]
        assert_close(same, adapter, ROUNDING)


def test_rows_that_do_not_divide_are_evaluated_once(runs: tuple[Path, Path]) -> None:
    known, _ = read_rank(runs[0], 0)
    assert len(known["heldout_losses"]) == 2
    for rank in (0, 1):
        assert read_rank(runs[1], rank)[0]["heldout_losses"] == pytest.approx(known["heldout_losses"], rel=LOSS)


def test_checkpoints_are_whole_and_every_process_knows_the_best(runs: tuple[Path, Path]) -> None:
    best = {read_rank(runs[1], rank)[0]["best"] for rank in (0, 1)}
    assert len(best) == 1
    assert Path(best.pop()).is_dir()
    assert sorted(entry.name for entry in runs[1].iterdir() if entry.is_dir()) == ["checkpoint-2", "checkpoint-4"]
    states = {path.name for path in (runs[1] / "checkpoint-2").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_two_processes_resume(runs: tuple[Path, Path], assert_close: Fixture) -> None:
    """The last step of the run was the best, so its adapter is that of the run's end."""
    for rank in (0, 1):
        known, adapter = read_rank(runs[1], rank)
        assert known["best"].endswith("checkpoint-4")
        assert_close(load_file(runs[1] / f"resumed-{rank}.safetensors"), adapter, ROUNDING)
