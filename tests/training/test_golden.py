"""The demo's first 20 steps give the losses written down in tests/golden: a change of code must not change them.

In float32, where machines differ by rounding only. The tolerance, 0.01, is a tenth of the steps' own scatter and ten
times what one thread and two threads differ by at step 20 (0.001: 8-bit optimizer states round to the other neighbour
now and then). Write the file anew, after a change that is meant to change them, with
``python tests/training/test_golden.py``.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl

from jebi.config import read_run
from jebi.run import train

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "demo_losses.txt"
STEPS = 20
TOLERANCE = 0.01


class StopEarly(TrainerCallback):
    """Ends the run after `STEPS` of the demo's schedule."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        control.should_training_stop = state.global_step >= STEPS
        return control


def demo_losses(output: Path) -> list[float]:
    """Losses of the demo's first steps, in float32."""
    settings = [
        f"data.train={ROOT / 'examples/data/train.jsonl'}",
        f"train.output_dir={output}",
        "model.dtype=float32",
        "train.use_cpu=true",
    ]
    trainer = train(read_run(ROOT / "examples" / "demo.yaml", settings), [StopEarly()])
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_demo_losses_are_the_golden_ones(tmp_path: Path) -> None:
    golden = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    losses = demo_losses(tmp_path)
    assert len(losses) == len(golden) == STEPS
    for step, (found, expected) in enumerate(zip(losses, golden), 1):
        assert abs(found - expected) < TOLERANCE, f"step {step}: {found} instead of {expected}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = demo_losses(Path(folder))
    GOLDEN.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(values, 1)))
