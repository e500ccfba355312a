"""LoRA of a small model: jebi beside TRL + PEFT (+ bitsandbytes for 4 bits), same rows, adapter start and settings.

Each contender runs in a process of its own, one after the other, on the demo's rows in their order (2 rows a batch,
4 batches a step). Speeds are real tokens a second, padding never counted, without the first two steps. No speed is
printed when the loss curves differ by more than 0.01 on average.

    python benchmarks/vs_trl.py [--steps 20] [--cases "float32;bfloat16;4bit"] [--out docs/benchmarks]
    python benchmarks/vs_trl.py --device cuda --steps 200 --cases "bfloat16;4bit bfloat16;float16" --out docs/benchmarks
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "examples" / "data" / "train.jsonl"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, ACCUMULATION = 2, 4
SKIPPED = 2
"""Steps left out of the speed: the first ones warm allocators and caches."""

CASES = {
    "float32": {"dtype": "float32", "bits4": False, "checkpointing": False},
    "float32, checkpointing": {"dtype": "float32", "bits4": False, "checkpointing": True},
    "bfloat16": {"dtype": "bfloat16", "bits4": False, "checkpointing": False},
    "4bit": {"dtype": "float32", "bits4": True, "checkpointing": False},
    "4bit bfloat16": {"dtype": "bfloat16", "bits4": True, "checkpointing": False},
    "float16": {"dtype": "float16", "bits4": False, "checkpointing": False},
}


def texts(steps: int, eos: str) -> list[str]:
    """The demo's rows in the tutorial's template."""
    from jebi.data.templates import TUTORIAL

    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    chosen = (rows * (1 + steps * BATCH * ACCUMULATION // len(rows)))[: steps * BATCH * ACCUMULATION]
    return [TUTORIAL.format(**{name: row[name] for name in ("instruction", "input", "output")}) + eos for row in chosen]


def settings(case: dict[str, Any], steps: int, folder: str) -> dict[str, Any]:
    """Training arguments that both contenders get."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": case["device"] == "cpu",
        "bf16": case["dtype"] == "bfloat16",
        "fp16": case["dtype"] == "float16",
        "report_to": [],
        "save_strategy": "no",
        "seed": 3407,
    }


def clock() -> tuple[Any, list[float]]:
    """A callback that notes the end of every step, and its notes."""
    from transformers import TrainerCallback

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    return Clock(), marks


def jebi(case: dict[str, Any], steps: int, checkpoint: str, adapter: str, scratch: str) -> tuple[Any, list[float], Any]:
    """Train with jebi; its trainer, the clock's marks, and the tokenizer."""
    import torch
    from datasets import Dataset
    from transformers import TrainingArguments

    from jebi import FastLanguageModel, SFTTrainer
    from jebi.adapters.peft_files import read_weights

    model, tokenizer = FastLanguageModel.from_pretrained(
        checkpoint, dtype=getattr(torch, case["dtype"]), load_in_4bit=case["bits4"], device=case["device"]
    )
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=case["checkpointing"])
    read_weights(model, Path(adapter))
    callback, marks = clock()
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=Dataset.from_dict({"text": texts(steps, tokenizer.eos_token)}),
        args=TrainingArguments(**settings(case, steps, scratch)),
        callbacks=[callback],
    )
    trainer.train()
    return trainer, marks, tokenizer


def trl(case: dict[str, Any], steps: int, checkpoint: str, adapter: str, scratch: str) -> tuple[Any, list[float], Any]:
    """Train with TRL and PEFT; likewise."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    dtype = getattr(torch, case["dtype"])
    extra: dict[str, Any] = {}
    if case["bits4"]:
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        extra["device_map"] = case["device"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, **extra)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    callback, marks = clock()
    config = SFTConfig(
        **settings(case, steps, scratch), gradient_checkpointing=case["checkpointing"], max_length=2048, packing=False
    )
    rows = [tokenizer(text)["input_ids"] for text in texts(steps, tokenizer.eos_token)]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        args=config,
        callbacks=[callback],
    )
    trainer.train()
    return trainer, marks, tokenizer


def work(contender: str, case: dict[str, Any], steps: int, checkpoint: str, adapter: str) -> dict[str, Any]:
    """Run one contender in this process and measure it."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, marks, tokenizer = {"jebi": jebi, "trl": trl}[contender](case, steps, checkpoint, adapter, scratch)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts(steps, tokenizer.eos_token)]
    per_step = [sum(lengths[i : i + BATCH * ACCUMULATION]) for i in range(0, len(lengths), BATCH * ACCUMULATION)]
    seconds = [after - before for before, after in pairwise(marks)]
    rates = [tokens / s for tokens, s in zip(per_step[1:], seconds)][SKIPPED - 1 :]
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens_per_s": statistics.median(rates),
        "step_s": statistics.median(seconds[SKIPPED - 1 :]),
        "peak_gb": peak_gb(case["device"]),
    }


def peak_gb(device: str) -> float:
    """Most memory that this process has held: resident on a CPU, reserved on a card."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    import torch

    return torch.cuda.max_memory_reserved() / 2**30


def run(contender: str, case_name: str, device: str, steps: int, checkpoint: str, adapter: str) -> dict[str, Any]:
    """One contender in a process of its own."""
    command = [sys.executable, __file__, "--worker", contender, "--cases", case_name, "--steps", str(steps)]
    command += ["--checkpoint", checkpoint, "--adapter", adapter, "--device", device]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    raise SystemExit(f"{contender} failed on {case_name}:\n{done.stderr[-3000:]}")


def prepare(folder: Path) -> tuple[str, str]:
    """The embedded model as a Hugging Face folder, and one fresh adapter that both contenders start from."""
    import torch

    from jebi import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained("smollm2", dtype=torch.float32, load_in_4bit=False)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    FastLanguageModel.get_peft_model(model, target_modules=TARGETS).save_pretrained(folder / "adapter")
    return str(folder / "model"), str(folder / "adapter")


def machine(name: str) -> str:
    """Processor, threads and commit, for the record."""
    import torch

    from jebi.training.report import memory_before

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    device = memory_before(torch.device(name)).device
    return f"{device}; Python {platform.python_version()}, torch {torch.__version__}; commit {commit.stdout.strip()}"


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table, one row a case; cases whose curves disagree show no speed."""
    lines = [
        "| case | TRL tokens/s | jebi tokens/s | ratio | TRL peak GB | jebi peak GB | mean loss difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pair in results.items():
        ours, theirs = pair["jebi"], pair["trl"]
        apart = statistics.mean(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        if apart > 0.01:
            lines.append(
                f"| {name} | no speed: the loss curves differ by {apart:.4f} on average | | | | | {apart:.4f} |"
            )
            continue
        ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
        lines.append(
            f"| {name} | {theirs['tokens_per_s']:.0f} | {ours['tokens_per_s']:.0f} | {ratio:.2f}x "
            f"| {theirs['peak_gb']:.2f} | {ours['peak_gb']:.2f} | {apart:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the contenders case by case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--cases", default="float32;float32, checkpointing;bfloat16;4bit", help="names of cases, separated by ';'"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for train_cpu.json and train_cpu.md, or vs_trl.json and vs_trl.md of a card"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        result = work(
            args.worker, CASES[args.cases] | {"device": args.device}, args.steps, args.checkpoint, args.adapter
        )
        print("RESULT " + json.dumps(result))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, adapter = prepare(Path(folder))
        for name in args.cases.split(";"):
            results[name] = {
                who: run(who, name, args.device, args.steps, checkpoint, adapter) for who in ("trl", "jebi")
            }
            print(table({name: results[name]}).splitlines()[-1], file=sys.stderr, flush=True)
    text = f"{machine(args.device)}\n\n{table(results)}\n"
    print(text)
    if args.out:
        name = "train_cpu" if args.device == "cpu" else "vs_trl"
        title = "Training on a CPU" if args.device == "cpu" else "Training a small model on a card"
        args.out.mkdir(parents=True, exist_ok=True)
        measured = {"machine": machine(args.device), "results": results}
        (args.out / f"{name}.json").write_text(json.dumps(measured, indent=2) + "\n")
        command = f"python benchmarks/vs_trl.py --device {args.device} --steps {args.steps}"
        (args.out / f"{name}.md").write_text(f"# {title}\n\n`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
