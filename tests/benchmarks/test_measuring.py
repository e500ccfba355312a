"""The benchmarks that say where time goes run on a CPU too, and tell of everything they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, out: Path, *words: str) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--json", str(out), *words]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed, json.loads(out.read_text())


def test_kernels(tmp_path: Path) -> None:
    """Every file of the kernels has an operation in the table, and every operation a time and a reference's."""
    printed, figures = run("kernels.py", tmp_path / "figures.json", "--tokens", "32")
    assert figures["shapes"]["tokens"] == 32
    names = [operation["name"] for operation in figures["operations"]]
    assert all(f"| {name} | " in printed for name in names)
    words = {
        "adamw8bit": "adamw8bit",
        "cached_attention": "cached attention",
        "dequantize": "nf4 dequantise",
        "few_rows": "few rows",
        "gather": "gather from host memory",
        "glu": "glu backward",
        "linear_cross_entropy": "linear cross-entropy",
        "low_rank": "thin products",
        "rms_norm": "rms_norm backward",
        "rope": "rope",
        "scaled_product": "scaled product",
        "sliced_cross_entropy": "sliced cross-entropy",
    }
    if figures["device"] == "CPU":
        words["nf4_on_cpu"] = "nf4 on a CPU"
    files = {file.stem for file in (ROOT / "src" / "jebi" / "kernels").glob("*.py")} - {"__init__"}
    assert words.keys() | {"nf4_on_cpu"} == files
    assert all(any(word in name for name in names) for word in words.values())
    assert len(names) == len(set(names)) >= 11
    assert all(operation["kernel_ms"] > 0 and operation["gb_s"] > 0 for operation in figures["operations"])


def test_startup(tmp_path: Path, tiny_llama) -> None:
    printed, figures = run("startup.py", tmp_path / "figures.json", "--path", str(tiny_llama("worded")), "--steps", "1")
    parts = figures["parts"]
    steps = [name for name in parts if name.startswith("train: step")]
    assert steps == ["train: step 1"]
    # Parts follow each other without a gap, but for a few lines between them.
    whole = parts.pop("all")
    assert 0.9 * whole < sum(parts.values()) <= whole + 0.01
    assert all(name in printed for group in figures.values() for name in group)
    assert all(figures["reading"][name] > 0 for name in ("staged GB/s", "mapped GB/s"))


def test_plan_runs(tmp_path: Path) -> None:
    """Names are trainings of every kind that is promised; three tiny ones are planned, run and written down."""
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_runs.py"), "--out", str(tmp_path)]
    names = ["tiny-4bit-64-r8-all", "tiny-8bit-32-r4-2GB", "tiny-16bit-32-r4-2GB"]
    printed = subprocess.run([*command, "--runs", ",".join(names)], capture_output=True, text=True, check=True).stdout
    assert "3 of 3 runs ended" in printed
    results = json.loads((tmp_path / "plan.json").read_text())
    assert [result["run"] for result in results] == names
    for result in results:
        assert result["peak_gb"] > 0
        assert result["step_s"] > 0
        # Planned before the model was there, and told by the trainer, who has it: one count.
        assert result["planned_gb"] == result["told_gb"]
        assert result["planned_step_s"] == result["told_step_s"]
    assert names[0] in (tmp_path / "plan.md").read_text()
    subprocess.run([*command, "--against-literals", "--runs", names[0]], capture_output=True, check=True)
    literals = json.loads((tmp_path / "plan_literals.json").read_text())
    assert [result["choice"] for result in literals] == ["auto", "True", "False", "unsloth"]
    assert "auto slower by" in (tmp_path / "plan_literals.md").read_text()


def test_decode(tmp_path: Path, tiny_llama) -> None:
    words = ("--path", str(tiny_llama("worded")), "--against", "", "--device", "cpu", "--new", "4")
    printed, figures = run("decode.py", tmp_path / "figures.json", *words, "--rows", "1,2", "--prompts", "5,9")
    assert isinstance(figures, list)
    assert [(case["prompt"], case["bs"]) for case in figures] == [(5, 1), (5, 2), (9, 1), (9, 2)]
    assert all(case["prefill_ms"] > 0 and case["decode_tok_s"] > 0 for case in figures)
    assert printed.count("| jebi |") == 4
