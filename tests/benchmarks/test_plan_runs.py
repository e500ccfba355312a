"""What is counted now, beside what an H200 reserved in the trainings of docs/benchmarks/plan.json."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from jebi.config import LoraConfig, Places
from jebi.models.families import read_config
from jebi.plan.held import Held
from jebi.plan.inventory import CONTEXT_BYTES, GIB, everything, total
from jebi.plan.jobs import Job
from jebi.plan.passes import PassPlan

ROOT = Path(__file__).parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "plan_runs.py"), run_name="plan_runs")
RESULTS = json.loads((ROOT / "docs" / "benchmarks" / "plan.json").read_text())


def counted(result: dict[str, Any]) -> float:
    """GiB of a run, by the plan that was made for it."""
    run, plan = BENCHMARK["Run"](result["run"]), result["plan"]
    shape, storage, row, rank, _ = run.parts
    places = Places(plan["embedding"], plan["head"])
    config = read_config(BENCHMARK["model_config"](shape))
    held = Held(config, storage, 2, places, LoraConfig(r=rank))
    passes = PassPlan(
        plan["checkpointing"], plan["pass_tokens"], "weights dequantised once" in result["planned"],
        kept_layers=plan["kept_layers"], shipped_layers=plan["shipped_layers"],
    )  # fmt: skip
    made = passes.made(Job(held, row, run.batch, steps=6).filled(plan["pass_tokens"]))
    return (total(everything(held, made)) - CONTEXT_BYTES) / GIB


def test_all_runs_are_there() -> None:
    assert [result["run"] for result in RESULTS] == list(BENCHMARK["RUNS"])


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: result["run"])
def test_a_run_takes_what_is_counted(result: dict[str, Any]) -> None:
    """Within 4 %, and not more than is counted by more than 2."""
    assert -0.02 <= counted(result) / result["peak_gb"] - 1 <= 0.04
