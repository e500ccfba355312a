"""Trainings over 1, 2 and 4 processes (gloo, CPU) of the same rows: the same adapter, divided base or not.

Five optimizer steps of 8 rows, the last of 3, so that one of four processes has none in it.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("ranks.py")

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "pass_tokens": 64,  # several passes a step, not always as many in all processes
    "learning_rate": 1e-2,
    "max_grad_norm": 0.1,  # clips at every step
    "optim": "adamw_torch",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "include_num_input_tokens_seen": "all",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

ROUNDING = 1e-5
"""Bar for adapters after 5 steps of Adam whose float32 gradients are summed in another order."""
LOSS = 2e-6
"""Bar for losses of about 6, and gradients' norms, in float32."""

Run = tuple[dict[str, Any], dict[str, Tensor]]


def texts(count: int, seed: int) -> list[str]:
    """Rows of 9 to 61 tokens, half of them with a beginning in common."""
    chance = random.Random(seed)
    made = ["".join(chance.choices("abcdefgh ", k=chance.randint(8, 40))) for _ in range(count)]
    return [("### a template:\n" if number % 2 else "") + text + "</s>" for number, text in enumerate(made)]


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``runs(name, rank)``: what that process of that job knows afterwards, and its adapter."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(name: str, ranks: int, batch: int, accumulation: int, **more: Any) -> dict[str, Any]:
        settings = SETTINGS | {"output_dir": str(folder / name), "gradient_accumulation_steps": accumulation}
        settings |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 2} | more.pop("settings", {})
        given = {"model": str(tiny_folder), "rows": texts(35, 0), "heldout": texts(5, 1)}
        return given | {"ranks": ranks, "settings": settings} | more

    nf4, shard = {"load_in_4bit": True}, {"shard": True}
    without_saving = {"save_strategy": "no", "eval_strategy": "no"}
    jobs = [
        job("one", 1, 8, 1, load=nf4),
        job("two", 2, 2, 2, load=nf4),
        job("four", 4, 2, 1, load=nf4),
        job("two divided", 2, 2, 2, load=nf4 | shard, settings={"save_strategy": "no"}),
        job("one int8", 1, 8, 1, load={"load_in_8bit": True}, settings=without_saving),
        job("two int8 divided", 2, 4, 1, load={"load_in_8bit": True} | shard, settings=without_saving),
        job("one dense", 1, 8, 1, load={"load_in_4bit": False}, settings=without_saving),
        job("two dense divided", 2, 4, 1, load={"load_in_4bit": False} | shard, settings=without_saving),
        job("two on four", 4, 1, 2, load=nf4, settings=without_saving, resume=str(folder / "two" / "checkpoint-2")),
        job("four on one", 1, 4, 2, load=nf4, settings=without_saving, resume=str(folder / "four" / "checkpoint-4")),
        job("stopped", 2, 4, 1, load=nf4, settings=without_saving, ctrl_c=2),
        job("other rows", 2, 4, 1, load=nf4, settings=without_saving, differ=True),
        job("one full", 1, 8, 1, load={"full_finetuning": True}, settings=without_saving),
        job("two full", 2, 4, 1, load={"full_finetuning": True}, settings=without_saving),
        job("one stream", 1, 8, 1, load=nf4, settings=without_saving | {"max_steps": 5}, stream=True),
        job("two streams", 2, 4, 1, load=nf4, settings=without_saving | {"max_steps": 5}, stream=True),
    ]
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]

    def read(name: str, rank: int) -> Run:
        known = json.loads((folder / name / f"rank-{rank}.json").read_text(encoding="utf-8"))
        return known, load_file(folder / name / f"rank-{rank}.safetensors")

    return read


def figures(known: dict[str, Any]) -> dict[tuple[int, str], float]:
    """What a run logged, by step and name."""
    wanted = ("loss", "grad_norm", "eval_loss", "learning_rate", "num_input_tokens_seen")
    return {(entry["step"], name): entry[name] for entry in known["log"] for name in wanted if name in entry}


@pytest.mark.parametrize(
    ("name", "ranks", "alone"),
    [
        ("two", 2, "one"),
        ("four", 4, "one"),
        ("two divided", 2, "one"),
        ("two int8 divided", 2, "one int8"),
        ("two dense divided", 2, "one dense"),
        ("two on four", 4, "one"),
        ("four on one", 1, "one"),
        ("two full", 2, "one full"),
        ("two streams", 2, "one stream"),
    ],
)
def test_several_processes_make_the_adapter_of_one(
    runs: Callable[..., Run], assert_close: Any, name: str, ranks: int, alone: str
) -> None:
    expected, adapter = runs(alone, 0)
    for rank in range(ranks):
        known, same = runs(name, rank)
        assert_close(same, adapter, ROUNDING)
        assert known["step"] == expected["step"] == 5
        there, alone_there = figures(known), figures(expected)
        assert {5, "loss"} <= {part for key in there for part in key}
        assert there == pytest.approx({key: alone_there[key] for key in there}, rel=LOSS)
        assert known["answer"] == expected["answer"]
        first = runs(name, 0)[1]
        assert all(same[tensor].equal(first[tensor]) for tensor in first), "processes hold the same bits"


def test_rows_are_dealt_evenly_and_all_are_counted(runs: Callable[..., Run]) -> None:
    expected = runs("one", 0)[0]["tokens"]
    for name, ranks in (("two", 2), ("four", 4)):
        known = runs(name, 0)[0]
        assert known["tokens"] == expected == sum(known["by_rank"])
        assert len(known["by_rank"]) == ranks
        # Of 8 rows of 9 to 61 tokens each gets 4 or 2.
        assert max(known["by_rank"]) < 1.2 * min(known["by_rank"])
        assert known["log"][-1]["total_flos"] == pytest.approx(runs("one", 0)[0]["log"][-1]["total_flos"], rel=1e-6)


def test_a_divided_base_is_held_in_parts(runs: Callable[..., Run]) -> None:
    for kind in ("", " int8", " dense"):
        whole = runs(f"one{kind}", 0)[0]
        for rank in range(2):
            known = runs(f"two{kind} divided", rank)[0]
            assert known["bytes"] == known["counted"], "a plan counts what is held"
            # Beside its half every process has the scales that are floating point numbers: of int8 a seventeenth.
            assert known["divided"] == ["torch.float32"], "FSDP2 of torch 2.11 takes no integers"
            assert whole["bytes"] / 2 <= known["bytes"] <= 0.54 * whole["bytes"]
            assert known["numbers"] == whole["numbers"], "parts are not counted for the whole, nor codes for numbers"
            assert ["shard=True" in refused for refused in known["refused"]] == [True] * 3


@pytest.mark.parametrize("name", ["one", "two", "two divided", "two int8 divided", "two dense divided", "two full"])
def test_a_process_holds_what_its_plan_counts(runs: Callable[..., Run], name: str) -> None:
    for rank in range(1 if name == "one" else 2):
        known = runs(name, rank)[0]
        # On a CPU a process alone has them matrix by matrix, without padding.
        assert known["gradients"] == known["counted gradients"] or name == "one", "with what travels along"
        predicted = known["predicted"]
        assert predicted["parts_gb"]["model"] * 2**30 == known["model"]
        assert known["predicted_by_rank"] == ([] if name == "one" else [predicted["peak_gb"]] * 2)


def test_one_ctrl_c_stops_all_after_the_same_step(runs: Callable[..., Run]) -> None:
    for rank in range(2):
        known, _ = runs("stopped", rank)
        assert known["error"].startswith("KeyboardInterrupt")
        assert known["step"] == 2


def test_processes_that_read_other_rows_are_told(runs: Callable[..., Run]) -> None:
    for rank in range(2):
        assert "read different rows" in runs("other rows", rank)[0]["error"]


def test_machines_that_share_layers_have_as_many_processes_each(runs: Callable[..., Run]) -> None:
    for rank in range(2):
        assert "{1, 2} of them: start as many on each" in runs("other rows", rank)[0]["uneven"]
