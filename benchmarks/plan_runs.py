"""What a plan says before anything is loaded, beside what the training then took: 24 runs on the present card.

    python benchmarks/plan_runs.py [--out docs/benchmarks] [--runs 8b-4bit-2048-r8-16GB,...]
    python benchmarks/plan_runs.py --against-literals

Memory is what torch's allocator reserved at most while training; a step's time is that of the card, the first steps
left out. Weights and rows are drawn: no checkpoint is read. Each run has a process of its own, forked from one that has
imported everything and never touched the card. ``--against-literals`` runs use_gradient_checkpointing="auto" beside
True, False and "unsloth" within the same budgets instead.

A run's name is shape-bits-rows-rank-budget; ``all`` is the whole card.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jebi.plan.inventory import CONTEXT_BYTES, GIB

RUNS = (
    # 0.1 billion values
    "0.1b-4bit-256-r8-6GB", "0.1b-16bit-1024-r64-6GB", "0.1b-4bit-16384-r8-16GB", "0.1b-16bit-2048-r8-all",
    # 1 billion
    "1b-4bit-256-r8-6GB", "1b-4bit-2048-r64-6GB", "1b-16bit-1024-r8-6GB", "1b-16bit-4096-r8-16GB",
    "1b-4bit-16384-r8-24GB", "1b-16bit-16384-r64-80GB", "1b-4bit-2048-r8-all",
    # 3 billion
    "3b-4bit-512-r8-6GB", "3b-4bit-2048-r64-16GB", "3b-16bit-1024-r8-16GB", "3b-16bit-4096-r64-24GB",
    "3b-4bit-16384-r8-24GB", "3b-16bit-2048-r8-all",
    # 8 billion
    "8b-4bit-512-r8-6GB", "8b-4bit-2048-r8-16GB", "8b-4bit-8192-r64-24GB", "8b-16bit-1024-r8-24GB",
    "8b-16bit-4096-r64-80GB", "8b-4bit-16384-r8-80GB", "8b-4bit-2048-r64-all",
)  # fmt: skip
LITERALS = (
    "1b-4bit-2048-r8-6GB", "3b-16bit-4096-r8-16GB", "8b-4bit-2048-r8-6GB", "8b-4bit-2048-r8-24GB",
    "8b-4bit-8192-r8-all",
)  # fmt: skip
CHOICES: dict[str, Any] = {"auto": "auto", "True": True, "False": False, "unsloth": "unsloth"}
STORAGES = {"4bit": "nf4", "8bit": "int8", "16bit": "dense"}
SHAPES = {"0.1b": "smollm2-135m", "1b": "llama-3.2-1b", "3b": "llama-3.2-3b", "8b": "llama-3.1-8b"}
TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 192, "vocab_size": 300, "rms_norm_eps": 1e-6,
}  # fmt: skip
STEPS, STEP_TOKENS, STEP_ROWS = 6, 16384, 8
NEAR_MEMORY, UNDER, NEAR_TIME, SLOWER = 0.04, 0.02, 0.15, 0.03
ENOUGH_MEMORY, ENOUGH_TIME = 22, 20
LIMIT_S = 150


@dataclass(frozen=True)
class Run:
    """One training."""

    name: str
    choice: str = "auto"

    @property
    def parts(self) -> tuple[str, str, int, int, str | None]:
        """Shape, how projections are held, tokens of a row, rank and budget."""
        shape, bits, row, rank, budget = self.name.split("-")
        return shape, STORAGES[bits], int(row), int(rank[1:]), None if budget == "all" else budget

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return max(1, min(STEP_ROWS, STEP_TOKENS // self.parts[2]))


def train(run: Run) -> dict[str, Any]:
    """Plan, then train, in this process."""
    import torch
    from datasets import Dataset

    from jebi import FastLanguageModel, SFTConfig, SFTTrainer
    from jebi.config import LoraConfig
    from jebi.models.device import default_device, default_dtype
    from jebi.models.families import read_config
    from jebi.models.loading import load_model
    from jebi.plan.held import Held
    from jebi.plan.inventory import by_part
    from jebi.plan.jobs import Job
    from jebi.plan.prediction import predict
    from jebi.plan.present import available, card_of, host_bytes, memory_of
    from jebi.plan.words import words
    from jebi.training.budget import within

    shape_name, storage, row, rank, budget = run.parts
    device = default_device()
    dtype, on_card = default_dtype(device), device.type == "cuda"
    config = model_config(shape_name)
    asked = {"auto": None, "True": "recompute", "False": "none", "unsloth": "offload"}[run.choice]
    shape, lora = read_config(config), LoraConfig(r=rank)
    held = Held(shape, storage, dtype.itemsize, lora=lora, on_card=on_card)  # type: ignore[arg-type]
    job = Job(held, row, run.batch, STEPS, asked)  # type: ignore[arg-type]
    began = time.perf_counter()
    planned = predict(job, card_of(device), available(device, budget), host_bytes(device))
    plan_seconds = time.perf_counter() - began
    context = CONTEXT_BYTES if on_card else 0
    result: dict[str, Any] = {
        "run": run.name, "choice": run.choice, "device": named(device), "torch": torch.__version__,
        "budget_gb": planned.budget / GIB, "fits": planned.fits, "plan_s": plan_seconds,
        "planned_gb": (planned.peak - context) / GIB, "planned_step_s": planned.step.seconds,
        "parts_gb": {part: size / GIB for part, size in by_part(list(planned.items))},
        "planned": words(planned.plan, planned.places, planned.job),
    }  # fmt: skip
    with within(device, budget):
        model = load_model(Drawn(config, device, dtype), config, dtype, device, storage)  # type: ignore[arg-type]
        model.max_seq_length = row
        FastLanguageModel.get_peft_model(model, r=rank, use_gradient_checkpointing=CHOICES[run.choice])
        loaded = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(
                output_dir=folder, per_device_train_batch_size=run.batch, max_steps=STEPS, optim="adamw_8bit",
                learning_rate=1e-4, bf16=on_card and dtype == torch.bfloat16, use_cpu=not on_card, report_to=[],
                logging_steps=1, save_strategy="no", disable_tqdm=True, memory_budget=budget,
                allow=["missing-bos", "missing-eos"],
            )  # fmt: skip
            rows = Dataset.from_dict({"input_ids": drawn_rows(row, run.batch * STEPS, config.vocab_size)})
            trainer = SFTTrainer(
                model=model, tokenizer=byte_tokenizer(), train_dataset=rows, max_seq_length=row, args=args
            )
            trainer.train()
    report = trainer.report
    assert report is not None
    result |= {
        "told_gb": report.predicted["peak_gb"], "told_step_s": report.predicted.get("step_seconds"),
        "peak_gb": report.peak_gb, "step_s": report.step_seconds, "plan": report.plan, "load_s": loaded,
        "run_s": time.perf_counter() - began,
    }  # fmt: skip
    if on_card:
        free, _ = torch.cuda.mem_get_info(device)
        result["context_gb"] = (memory_of(device) - free - torch.cuda.memory_reserved(device)) / GIB
        result["allocated_gb"] = torch.cuda.max_memory_allocated(device) / GIB
    return result


def named(device: Any) -> str:
    """As reports name it."""
    from jebi.training.report import memory_before

    return memory_before(device).device


def model_config(shape: str) -> Any:
    """A config of transformers with a known shape's sizes, for rows of any length."""
    from transformers import AutoConfig

    from jebi.models.known_shapes import KNOWN

    fields = {**(TINY if shape == "tiny" else KNOWN[SHAPES[shape]]), "max_position_embeddings": 131072}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


class Drawn:
    """A checkpoint that is drawn where it will live: as many tensors as the config calls for."""

    path = Path("drawn")

    def __init__(self, config: Any, device: Any, dtype: Any):
        self._config, self._device, self._dtype = config, device, dtype

    def tensors(self) -> Iterator[Any]:
        """Norms of ones, and matrices by a generator's seed."""
        import torch
        from transformers import AutoModelForCausalLM

        from jebi.models.files import StoredTensor

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)
        for number, (name, value) in enumerate(model.state_dict().items()):
            if name != "lm_head.weight" or not self._config.tie_word_embeddings:
                yield StoredTensor(name, tuple(value.shape), self.path, partial(self._draw, tuple(value.shape), number))

    def _draw(self, shape: tuple[int, ...], seed: int) -> Any:
        import torch

        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        return drawn.mul_(shape[1] ** -0.5)


def drawn_rows(row: int, count: int, vocabulary: int) -> list[list[int]]:
    """Rows of one length that have nothing in common."""
    drawn = random.Random(0)
    return [[drawn.randrange(3, vocabulary) for _ in range(row)] for _ in range(count)]


def byte_tokenizer() -> Any:
    """One token a byte; the rows are tokens already, but a trainer wants one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*special, *alphabet])}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def measure(run: Run) -> dict[str, Any]:
    """The run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        sys.stdout.flush()
        sys.stderr.flush()
        if (child := os.fork()) == 0:
            _child(run, out, log)
        began = time.monotonic()
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() - began > LIMIT_S:
                os.kill(child, 9)
            time.sleep(0.05)
        if out.is_file():
            return dict(json.loads(out.read_text()))
        return {"run": run.name, "choice": run.choice, "failed": log.read_text()[-3000:] if log.is_file() else "killed"}


def _child(run: Run, out: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    if torch.cuda._is_in_bad_fork():  # something that was imported has looked at the card
        os.execv(
            sys.executable, [sys.executable, __file__, "--one", run.name, "--choice", run.choice, "--json", str(out)]
        )
    try:
        write(run, out)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def write(run: Run, out: Path) -> None:
    """Train, and write the result; what does not fit is one."""
    from jebi.errors import OutOfMemoryError

    try:
        result = train(run)
    except OutOfMemoryError as error:
        result = {"run": run.name, "choice": run.choice, "refused": str(error)}
    partial_out = out.with_suffix(".partial")
    partial_out.write_text(json.dumps(result))
    partial_out.replace(out)


def table(results: list[dict[str, Any]]) -> str:
    """One line a run."""
    lines = ["| run | planned GiB | measured GiB | | planned step s | measured step s | | chosen |", "|" + "---|" * 8]
    for result in results:
        if "peak_gb" not in result:
            reason = result.get("refused") or result["failed"].strip().splitlines()[-1]
            lines.append(f"| {result['run']} | {reason[:100].rpartition(' ')[0]} ... |" + " |" * 6)
            continue
        memory = f"{result['planned_gb']:.2f} | {result['peak_gb']:.2f} | {100 * memory_error(result):+.1f} %"
        times = f"{result['planned_step_s']:.3f} | {result['step_s']:.3f} | {100 * time_error(result):+.0f} %"
        lines.append(f"| {result['run']} | {memory} | {times} | {result['planned']} |")
    return "\n".join(lines)


def memory_error(result: dict[str, Any]) -> float:
    """Share by which the planned peak is above the measured one."""
    return float(result["planned_gb"] / result["peak_gb"] - 1)


def time_error(result: dict[str, Any]) -> float:
    """Share by which the planned step is longer than the measured one."""
    return float(result["planned_step_s"] / result["step_s"] - 1)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """How many runs are as near as they should be."""
    done = [result for result in results if "peak_gb" in result]
    near = sum(abs(memory_error(result)) <= NEAR_MEMORY for result in done)
    under = [result["run"] for result in done if memory_error(result) < -UNDER]
    timed = sum(abs(time_error(result)) <= NEAR_TIME for result in done)
    # What a process takes of a card is what its allocator reserved and the context that the budget counts beside it.
    context = {True: CONTEXT_BYTES / GIB, False: 0.0}
    over = [r["run"] for r in done if r["peak_gb"] + context["context_gb" in r] > r["budget_gb"] + 1e-3]
    return [
        f"{len(done)} of {len(results)} runs ended",
        f"predicted peak within {NEAR_MEMORY:.0%}: {near} (wanted {ENOUGH_MEMORY} of {len(RUNS)})",
        f"under by more than {UNDER:.0%}: {', '.join(under) or 'none'}",
        f"predicted step within {NEAR_TIME:.0%}: {timed} (wanted {ENOUGH_TIME} of {len(RUNS)})",
        f"beyond its budget: {', '.join(over) or 'none'}",
    ]


def literals_table(results: list[dict[str, Any]]) -> str:
    """One line a budget, tokens a second of each choice; in the last column how much slower "auto" is than the best."""
    lines = [f"| run | {' | '.join(CHOICES)} | auto slower by |", "|" + "---|" * (len(CHOICES) + 2)]
    for name in dict.fromkeys(result["run"] for result in results):
        steps = {r["choice"]: r.get("step_s") for r in results if r["run"] == name}
        rate = Run(name).batch * Run(name).parts[2]
        cells = [f"{rate / steps[choice]:,.0f}" if steps.get(choice) else "does not fit" for choice in CHOICES]
        others = [seconds for choice, seconds in steps.items() if choice != "auto" and seconds]
        slower = f"{100 * (steps['auto'] / min(others) - 1):+.1f} %" if steps.get("auto") and others else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {slower} |")
    return "\n".join(lines)


def page(results: list[dict[str, Any]], literals: bool) -> str:
    """The results as a page."""
    first = next((result for result in results if "device" in result), {"device": "", "torch": ""})
    if literals:
        title = '"auto" beside what may be asked for instead'
        wanted = f"Tokens a second within the same budget, wanted within {SLOWER:.0%} of the best."
        body = f"{wanted}\n\n{literals_table(results)}"
    else:
        title = "What a plan says, and what it took"
        listed = "\n".join(f"- {line}" for line in summary(results))
        body = f"{listed}\n\n{table(results)}"
    return (
        f"# {title}\n\n{first['device']}, torch {first['torch']}, random weights and rows, {STEPS} steps of up to "
        f"{STEP_ROWS} rows and {STEP_TOKENS:,} tokens; `benchmarks/plan_runs.py`. How it is counted: "
        f"[planning](../planning.md).\n\n{body}\n"
    )


def main() -> None:
    """Measure all and print, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="", help="names, parted by commas; all 24 without them")
    parser.add_argument("--against-literals", action="store_true")
    parser.add_argument("--out", help="folder for plan.md and plan.json, or plan_literals.*")
    parser.add_argument("--one", help="run this one in this process")
    parser.add_argument("--choice", default="auto", choices=list(CHOICES))
    parser.add_argument("--json", help="file for the result of --one")
    arguments = parser.parse_args()
    if arguments.one:
        write(Run(arguments.one, arguments.choice), Path(arguments.json))
        return
    # torch then asks the driver's library and not CUDA whether there is a card, so that a fork may still use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    from jebi import SFTTrainer  # noqa: F401  (once, for all that are forked)

    names = arguments.runs.split(",") if arguments.runs else LITERALS if arguments.against_literals else RUNS
    runs = [Run(name) for name in names]
    if arguments.against_literals:
        runs = [replace(run, choice=choice) for run in runs for choice in CHOICES]
    began, results = time.monotonic(), []
    for run in runs:
        results.append(measure(run))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(literals_table(results) if arguments.against_literals else table(results))
    print("\n".join([] if arguments.against_literals else summary(results)))
    print(f"{time.monotonic() - began:.0f} s in all")
    if arguments.out:
        stem = "plan_literals" if arguments.against_literals else "plan"
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (folder / f"{stem}.md").write_text(page(results, arguments.against_literals), encoding="utf-8")


if __name__ == "__main__":
    main()
