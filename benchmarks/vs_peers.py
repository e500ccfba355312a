"""jebi beside its rivals on one CUDA card: same checkpoint, same rows, same settings, each in a process of its own.

    python benchmarks/vs_peers.py --peers FOLDER --workloads chat,full --against unsloth,hf

FOLDER is what `rivals.py` says. Prints one table and writes one JSON file. Where loss curves disagree no speed is
printed.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import rivals

STEPS = {"chat": 12, "full": 8, "long": 3, "longest": 3}
SEQUENCE = {"chat": 2048, "full": 2048, "long": 65536, "longest": 131072}
AGREEMENT = 0.01
"""Largest relative difference of the first steps' losses. Random weights and rows: they start at ln(vocabulary) and
hardly move, so that a wrong label, mask or scale shows in the second digit."""


@dataclass(frozen=True)
class Contender:
    """Who runs, and how."""

    name: str
    workload: str
    quant: str = "4bit"
    checkpointing: str = ""
    limit_gib: float = 0.0
    compute: str = "auto"


def rows(workload: str, batch: int, accumulation: int, steps: int) -> list[list[int]]:
    """The rows that the rivals' script draws: all of one length, or log-normal with a median of about 180 tokens."""
    drawn = random.Random(0)
    made = []
    for _ in range(batch * accumulation * steps):
        length = SEQUENCE[workload]
        if workload == "chat":
            length = int(min(max(drawn.lognormvariate(5.2, 0.6), 24), length))
        made.append([128000] + [drawn.randrange(0, 128000) for _ in range(length - 2)] + [128001])
    return made


def batches(workload: str) -> tuple[int, int]:
    """Rows of a micro-batch, and micro-batches of a step."""
    return (1, 1) if workload.startswith("long") else (2, 4)


def run_jebi(arguments: argparse.Namespace) -> None:
    """Train in this process and print one line, RESULT and a JSON object."""
    began = time.time()
    # First: what it imports then loads while the garbage collector rests.
    from jebi import FastLanguageModel, SFTConfig, SFTTrainer

    imported = time.time() - began
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    if arguments.limit_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.limit_gib * 2**30 / total)
    workload, sequence = arguments.workload, SEQUENCE[arguments.workload]
    model, tokenizer = FastLanguageModel.from_pretrained(
        arguments.path, max_seq_length=sequence, load_in_4bit=arguments.quant == "4bit", compute=arguments.compute
    )
    choice: Any = {"": "auto", "true": True, "false": False}.get(arguments.checkpointing, arguments.checkpointing)
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=choice)
    loaded = time.time() - began
    batch, accumulation = batches(workload)
    data = rows(workload, batch, accumulation, arguments.steps)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            marks.append(time.time())

    settings = SFTConfig(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        warmup_steps=5,
        max_steps=arguments.steps,
        learning_rate=2e-4,
        bf16=True,
        logging_steps=1,
        optim="adamw_8bit",
        weight_decay=0.01,
        lr_scheduler_type="linear",
        seed=3407,
        output_dir="/tmp/vs_peers",
        report_to=[],
        save_strategy="no",
        allow=["missing-eos"],  # rows of drawn tokens
    )
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": data}),
        max_seq_length=sequence,
        args=settings,
        callbacks=[Clock()],
    )
    started = time.time()
    trainer.train()
    torch.cuda.synchronize()
    trained = time.time()
    trainer.save_model()
    warm = marks[2:] if len(marks) > 4 else marks[1:]
    steps = [after - before for before, after in pairwise(warm)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    step_s = statistics.median(steps)
    result = {
        "impl": "jebi" if arguments.compute == "auto" else f"jebi {arguments.compute}",
        "data": workload,
        "quant": arguments.quant,
        "step_s": round(step_s, 4),
        "real_tokens_per_s": round(sum(map(len, data)) / arguments.steps / step_s, 1),
        "import_s": round(imported, 1),
        "load_s": round(loaded, 1),
        "first_step_s": round(marks[0] - started, 1),
        "train_s": round(trained - started, 1),
        "job_s": round(time.time() - began, 1),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "loss": [round(loss, 4) for loss in losses[:6]],
        "plan": trainer.report.plan if trainer.report is not None else None,
    }
    print("RESULT " + json.dumps(result), flush=True)


def measure(contender: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a process of its own; its RESULT and its wall time, or what went wrong."""
    steps = arguments.steps or STEPS[contender.workload]
    environment = dict(os.environ)
    if contender.name == "jebi":
        command = [sys.executable, __file__, "--jebi", "--path", arguments.path, "--workload", contender.workload]
        command += ["--steps", str(steps), "--quant", contender.quant, "--checkpointing", contender.checkpointing]
        command += ["--compute", contender.compute]
    else:
        batch, accumulation = batches(contender.workload)
        environment = rivals.environment(Path(arguments.peers))
        command = [*rivals.script(Path(arguments.peers)), "train", "--path", arguments.path]
        command += ["--impl", contender.name, "--data", "chat" if contender.workload == "chat" else "full"]
        command += ["--steps", str(steps), "--quant", contender.quant, "--seq", str(SEQUENCE[contender.workload])]
        command += ["--bs", str(batch), "--accum", str(accumulation)]
        command += ["--ckpt", contender.checkpointing or ("unsloth" if contender.name == "unsloth" else "true")]
    if contender.limit_gib:
        command += ["--limit-gib", str(contender.limit_gib)]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall = time.time() - began
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:]) | {"wall_s": round(wall, 1)}
    return {"impl": contender.name, "data": contender.workload, "failed": (done.stderr or done.stdout)[-2000:]}


def table(results: list[dict[str, Any]], rival: str) -> str:
    """One line a run; the ratio is that to the rival on the same workload and storage."""
    lines = ["| run | step s | tokens/s | ratio | peak reserved GiB | load s | first step s | wall s | loss |"]
    lines.append("|" + "---|" * 9)
    for result in results:
        name = f"{result['impl']}, {result['data']}, {result.get('quant', '')}"
        if "failed" in result:
            lines.append(f"| {name} | failed: {result['failed'].splitlines()[-1][:80]} |" + " |" * 7)
            continue
        same = [
            r
            for r in results
            if r["impl"] == rival and r["data"] == result["data"] and r.get("quant") == result["quant"]
        ]
        other = next((r for r in same if "failed" not in r), None)
        ratio = f"{result['real_tokens_per_s'] / other['real_tokens_per_s']:.2f}" if other else ""
        speed = f"{result['step_s']:.3f} | {result['real_tokens_per_s']:,.0f} | {ratio}"
        if other and not agree(result["loss"], other["loss"]):
            speed = "losses disagree | |"
        figures = (result["peak_reserved_gib"], result["load_s"], result["first_step_s"], result["wall_s"])
        lines.append(f"| {name} | {speed} | " + " | ".join(map(str, figures)) + f" | {result['loss'][:3]} |")
    return "\n".join(lines)


def agree(ours: list[float], theirs: list[float]) -> bool:
    """Whether the first steps' losses are the same but for rounding."""
    return all(abs(a - b) <= AGREEMENT * abs(b) for a, b in zip(ours[:3], theirs[:3]))


def main() -> None:
    """Measure everyone, or be jebi."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--path", default="/tmp/m8b", help="the checkpoint, which is made where there is none")
    parser.add_argument("--workloads", default="chat,full")
    parser.add_argument("--against", default="unsloth,hf")
    parser.add_argument("--quant", default="4bit")
    parser.add_argument("--compute", default="auto", help="jebi's, one after the other: auto,fp8")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", default="docs/benchmarks/vs_peers.json")
    parser.add_argument("--jebi", action="store_true", help="run jebi in this process; the rest is the driver")
    parser.add_argument("--workload", default="chat")
    parser.add_argument("--checkpointing", default="")
    parser.add_argument("--limit-gib", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.jebi:
        run_jebi(arguments)
        return
    rivals.make_checkpoint(Path(arguments.path), Path(arguments.peers))
    results = []
    for workload in arguments.workloads.split(","):
        others = [(name, "") for name in arguments.against.split(",") if name]
        for name, compute in [*others, *(("jebi", compute) for compute in arguments.compute.split(","))]:
            settings = arguments.quant, arguments.checkpointing, arguments.limit_gib, compute
            results.append(measure(Contender(name, workload, *settings), arguments))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, arguments.against.split(",")[0]))


if __name__ == "__main__":
    main()
