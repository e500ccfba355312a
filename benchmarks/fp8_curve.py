"""The loss curve of ``compute="fp8"`` beside that of the compute dtype: same model, rows, seeds and settings, one card.

    python benchmarks/fp8_curve.py [--model smollm2] [--rows examples/data/train.jsonl] [--steps 200] [--seeds 3407,1,2]

The demo's settings, but for the number of steps. Each run has a process of its own. Prints the mean loss of every 20
steps, that of held-out rows at the end, and how far the two are apart: the mean over the seeds with its standard error.
Fails where that is more than 0.5 % by more than two of its errors. Two trainings that round differently part by up to
0.9 % in a window of one seed (docs/log.md): take several seeds. ``--compute auto,fp8_backward`` is the other setting.
What rounding does shows in ``--compute auto,auto --second train.pass_tokens=700``, of which the sums alone differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 20
BAR = 0.005


def train(arguments: argparse.Namespace, compute: str) -> None:
    """Train in this process; print one line, RESULT and the losses as JSON, those of held-out rows at the end too."""
    from jebi.config import read_run
    from jebi.run import train

    run = read_run(ROOT / "examples" / "demo.yaml", arguments.set)
    run.model.name, run.model.compute = arguments.model, compute
    run.data.train, run.data.heldout = arguments.rows, arguments.heldout
    run.train |= {"max_steps": arguments.steps, "logging_steps": 1, "disable_tqdm": True}
    run.train |= {"eval_strategy": "steps", "eval_steps": arguments.steps}
    with tempfile.TemporaryDirectory() as folder:
        run.train["output_dir"] = folder
        trainer = train(run, [])
    assert trainer.report is not None
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    heldout = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    speed = round(trainer.report.tokens_per_second)
    result = {"losses": losses, "heldout": heldout, "plan": trainer.report.plan, "tokens_per_s": speed}
    print("RESULT " + json.dumps(result), flush=True)


def measure(compute: str, settings: list[str]) -> dict[str, Any]:
    """One run in a process of its own, with these settings too."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", compute]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line[7:]))
    sys.exit(f"compute {compute} failed: {done.stderr[-2000:]}")


def windows(losses: list[float]) -> list[float]:
    """Means of 20 steps each; a rest that is shorter is left out, if it is not all there is."""
    return [fmean(losses[start : start + WINDOW]) for start in range(0, max(1, len(losses) - WINDOW + 1), WINDOW)]


def apart(ones: list[float], others: list[float]) -> tuple[float, float]:
    """How far the others are above the ones, relative to these: the mean over seeds and its standard error."""
    shares = [other / one - 1 for one, other in zip(ones, others)]
    return fmean(shares), stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else 0.0


def main() -> None:
    """Measure both, or train one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, or smollm2")
    parser.add_argument("--rows", default=str(ROOT / "examples" / "data" / "train.jsonl"))
    parser.add_argument("--heldout", default=str(ROOT / "examples" / "data" / "heldout.jsonl"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="3407", help="one after the other")
    parser.add_argument("--compute", default="auto,fp8", help="which two")
    parser.add_argument("--set", action="append", help="another setting: section.key=value; may be repeated")
    parser.add_argument("--second", action="append", default=[], help="likewise, of the second alone")
    parser.add_argument("--run", help="train with this in the present process; the rest is the driver")
    arguments = parser.parse_args()
    if arguments.run:
        train(arguments, arguments.run)
        return
    names, columns = arguments.compute.split(","), []
    for name, settings in zip(names, ([], arguments.second), strict=True):
        results = [measure(name, [f"train.seed={seed}", *settings]) for seed in arguments.seeds.split(",")]
        print(f"{results[0]['plan']}, {results[0]['tokens_per_s']:,} tokens/s", file=sys.stderr)
        columns.append([[*windows(result["losses"]), result["heldout"]] for result in results])
    print("| steps | " + " | ".join(names) + " | apart |\n|---|---|---|---|")
    worst = 0.0
    for number, (ones, others) in enumerate(zip(*(zip(*column) for column in columns))):
        share, error = apart(ones, others)
        worst = max(worst, abs(share) - 2 * error)
        last = number == len(columns[0][0]) - 1
        steps = "held out" if last else f"{number * WINDOW + 1} to {(number + 1) * WINDOW}"
        print(f"| {steps} | {fmean(ones):.4f} | {fmean(others):.4f} | {share:+.2%} ({error:.2%}) |")
    if worst > BAR:
        sys.exit(f"apart by more than {BAR:.1%}, which two standard errors do not explain")


if __name__ == "__main__":
    main()
