"""The loss curve of ``compute="fp8"`` beside that of the compute dtype: same model, rows, seeds and settings, one card.

    python benchmarks/fp8_curve.py [--model smollm2] [--rows examples/data/train.jsonl] [--steps 200]

The demo's settings, but for the number of steps. Each run has a process of its own. Prints the mean loss of every 20
steps and how far the two are apart, and fails where that is more than 0.5 % anywhere. ``--compute auto,auto`` shows
what is noise.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 20
BAR = 0.005


def train(arguments: argparse.Namespace, compute: str) -> None:
    """Train in this process; print one line, RESULT and the losses as JSON."""
    from jebi.config import read_run
    from jebi.run import train

    run = read_run(ROOT / "examples" / "demo.yaml", arguments.set)
    run.model.name, run.model.compute = arguments.model, compute
    run.data.train = arguments.rows
    run.train |= {"max_steps": arguments.steps, "logging_steps": 1, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        run.train["output_dir"] = folder
        trainer = train(run, [])
    assert trainer.report is not None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": losses, "plan": trainer.report.plan, "tokens_per_s": round(trainer.report.tokens_per_second)}
    print("RESULT " + json.dumps(result), flush=True)


def measure(compute: str) -> dict[str, object]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", compute]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line[7:]))
    sys.exit(f"compute {compute} failed: {done.stderr[-2000:]}")


def windows(losses: list[float]) -> list[float]:
    """Means of 20 steps each; a rest that is shorter is left out, if it is not all there is."""
    return [fmean(losses[start : start + WINDOW]) for start in range(0, max(1, len(losses) - WINDOW + 1), WINDOW)]


def main() -> None:
    """Measure both, or train one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, or smollm2")
    parser.add_argument("--rows", default=str(ROOT / "examples" / "data" / "train.jsonl"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compute", default="auto,fp8", help="which two")
    parser.add_argument("--set", action="append", help="another setting: section.key=value; may be repeated")
    parser.add_argument("--run", help="train with this in the present process; the rest is the driver")
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments, arguments.run)
        return
    results = [measure(compute) for compute in arguments.compute.split(",")]
    for result in results:
        print(f"{result['plan']}, {result['tokens_per_s']:,} tokens/s", file=sys.stderr)
    curves = [windows(result["losses"]) for result in results]
    apart = [abs(other - one) / one for one, other in zip(*curves)]
    print("| steps | " + " | ".join(arguments.compute.split(",")) + " | apart |\n|---|---|---|---|")
    for number, (one, other, share) in enumerate(zip(*curves, apart)):
        print(f"| {number * WINDOW + 1} to {(number + 1) * WINDOW} | {one:.4f} | {other:.4f} | {share:.2%} |")
    if max(apart) > BAR:
        sys.exit(f"{max(apart):.2%} apart; the bar is {BAR:.1%}")


if __name__ == "__main__":
    main()
