"""Tokens a second of one and of several cards: data parallel, and a model divided among them. Random weights.

    python benchmarks/scaling.py --ranks 1,2 --workloads full,chat,large --limit 30 --json scaling.json

Every figure is a training of its own under torchrun, of as many processes on this machine. Rows are 2 x 4 a process and
step: of 2,048 tokens (full, large), or log-normal with a median of about 180 (chat). Llama 3.1 8B's shape (full, chat)
is whole on every card; 70B's (large) is divided, each card's memory limited to ``--limit`` GiB. The weights are drawn
where they are held, so no checkpoint is needed. The first losses must be those of one process with as many rows a step,
or no speed is printed. ``--tiny`` does the same with a model for CPUs, to try it out.

Speed is the tokens of the second half of the steps over the time of these. Left out are those in which a process still
captured a pass of a new shape (0.3 s): a training of thousands of steps does not see them, and here it is chance on how
many cards there were more. Steps wait for the process with the most tokens, whose share of them is in the table. Beside
it stands what adding up the gradients takes by itself. ``--json`` has every step's seconds and tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8},
}
AGREEMENT = 0.01
"""Largest relative difference of the first steps' losses, as in `vs_peers`."""
BATCH, ACCUMULATION = 2, 4
CHECKED = 3
"""Steps whose losses are compared."""
CAPTURED = 1.5
"""Times the usual seconds a token: in such a step a pass was captured. Padding and fixed costs make a fifth."""
STEPS = {"full": 12, "chat": 60, "large": 6}
"""Steps of a training: chat rows are of many lengths, so that few of their steps say little."""


def rows(workload: str, count: int, longest: int) -> list[list[int]]:
    """Drawn rows, the same in every process."""
    drawn = random.Random(0)
    made = []
    for _ in range(count):
        length = int(min(max(drawn.lognormvariate(5.2, 0.6), 24), longest)) if workload == "chat" else longest
        made.append([1] + [drawn.randrange(3, 250) for _ in range(length - 2)] + [2])
    return made


class Drawn:
    """A checkpoint of random weights: each is drawn where it is to be, from its name, so by whoever reads it."""

    path = Path("random weights")

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: Any, dtype: Any):
        self._shapes, self._device, self._dtype = shapes, device, dtype

    def tensors(self) -> Iterator[Any]:
        """All of them, layer after layer."""
        from jebi.models.files import StoredTensor

        for name, shape in self._shapes.items():
            yield StoredTensor(name, shape, self.path, lambda name=name, shape=shape: self._draw(name, shape))

    def _draw(self, name: str, shape: tuple[int, ...]) -> Any:
        import torch

        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(0, 0.02, generator=generator)


def build(arguments: argparse.Namespace, longest: int) -> tuple[Any, Any]:
    """The model, divided where it is large, with an adapter; a tokenizer that knows where rows end."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from jebi import FastLanguageModel
    from jebi.models.device import default_device, default_dtype
    from jebi.models.families import read_config
    from jebi.models.hf import JebiForCausalLM
    from jebi.models.loading import load_model
    from jebi.models.rope import read_rotary
    from jebi.models.shares import join

    device = default_device()
    dtype = torch.float32 if device.type == "cpu" else default_dtype(device)
    sizes = SHAPES["tiny" if arguments.tiny else "70b" if arguments.workload == "large" else "8b"]
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=8,
        vocab_size=512 if arguments.tiny else 128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    empty = JebiForCausalLM(config, read_config(config), dtype, read_rotary(config, device))
    shapes = {name: tuple(value.shape) for name, value in empty.named_parameters()}
    mesh = join(device) if arguments.workload == "large" else None
    model = load_model(Drawn(shapes, device, dtype), config, dtype, device, "nf4", mesh=mesh)
    model.max_seq_length = longest
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 256)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
    return model, tokenizer


class Steps:
    """When each step ended, and the tokens that each process had in it."""

    def __init__(self, ranks: int, on_card: bool):
        self._ranks, self._on_card = ranks, on_card
        self._marks: list[Any] = []
        self._lengths: list[int] = []
        self.tokens: list[list[int]] = []

    def read(self, batch: dict[str, Any]) -> None:
        """A micro-batch of the step under way."""
        self._lengths += batch["lengths"]

    def end(self) -> None:
        """The step's work is launched."""
        import torch

        from jebi.data.dealing import deal

        if self._on_card:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())
        self.tokens.append([sum(self._lengths[row] for row in rows) for rows in deal(self._lengths, self._ranks)])
        self._lengths = []

    def seconds(self) -> list[float]:
        """Of every step but the first."""
        import torch

        if not self._on_card:
            return [after - before for before, after in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._marks)]

    def result(self) -> dict[str, Any]:
        """Speed in the second half of the steps, and all steps."""
        seconds = self.seconds()
        timed = -(-len(seconds) // 2)
        last = list(zip(seconds[-timed:], self.tokens[-timed:], strict=True))
        usual = statistics.median(one / max(tokens) for one, tokens in last)
        kept = [(one, tokens) for one, tokens in last if one < CAPTURED * usual * max(tokens)]
        took, tokens = sum(one for one, _ in kept), sum(sum(tokens) for _, tokens in kept)
        return {
            "step_s": round(took / len(kept), 4),
            "tokens_per_s": round(tokens / took),
            "largest_share": round(sum(max(tokens) for _, tokens in kept) / tokens, 4),
            "timed_steps": len(kept),
            "left_out": timed - len(kept),
            "seconds": [None, *(round(one, 5) for one in seconds)],
            "tokens": self.tokens,
        }


def reduction_ms(trained: list[Any]) -> float | None:
    """What adding up the gradients of all processes takes while nothing else happens; None for one process."""
    import torch
    import torch.distributed as dist

    from jebi.config.limits import TRAVELLING
    from jebi.training.flat import starts_of

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    device = trained[0].device
    buffer = torch.zeros(starts_of(trained)[1] + TRAVELLING, device=device)
    times = []
    for _ in range(12):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return round(1000 * statistics.median(times[2:]), 3)


def train(arguments: argparse.Namespace) -> None:
    """Train as one process of several; the first one writes what came of it."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from jebi import SFTConfig, SFTTrainer

    on_card = torch.cuda.is_available()
    longest = 64 if arguments.tiny else 2048
    settings = SFTConfig(
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=arguments.accumulation,
        max_steps=arguments.steps,
        learning_rate=2e-4,
        bf16=on_card,
        use_cpu=not on_card,
        logging_steps=1,
        optim="adamw_8bit",
        output_dir=str(arguments.out),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        allow=["missing-eos", "masked-eos", "pad-is-eos", "duplicates", "repetitive"],  # rows of drawn tokens
    )
    if arguments.limit and on_card:
        total = torch.cuda.get_device_properties(settings.device).total_memory
        torch.cuda.set_per_process_memory_fraction(arguments.limit * 2**30 / total, settings.device)
    began = time.time()
    model, tokenizer = build(arguments, longest)
    loaded = time.time() - began
    step_rows = BATCH * arguments.accumulation * settings.world_size
    data = rows(arguments.workload, step_rows * arguments.steps, longest)
    steps = Steps(settings.world_size, on_card)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.end()
            control.should_training_stop |= state.global_step == arguments.stop

    class Watched(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            steps.read(inputs)
            return super().training_step(model, inputs, num_items_in_batch)

    dataset = Dataset.from_dict({"input_ids": data})
    trainer = Watched(model, tokenizer, dataset, max_seq_length=longest, args=settings, callbacks=[Clock()])
    trainer.train()
    report = trainer.report
    assert report is not None
    result = {
        "workload": arguments.workload,
        "ranks": settings.world_size,
        "device": report.before.device,
        **steps.result(),
        "reduction_ms": reduction_ms([p for p in model.parameters() if p.requires_grad]),
        "load_s": round(loaded, 1),
        "peak_gib": [round(rank.peak_gb, 2) for rank in report.ranks] or [round(report.peak_gb, 2)],
        "loss": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry][:CHECKED],
        "plan": report.plan,
    }
    if settings.process_index == 0:
        (arguments.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


def measure(
    arguments: argparse.Namespace, workload: str, ranks: int, accumulation: int = ACCUMULATION, stop: int = 0
) -> dict[str, Any]:
    """One training of ``ranks`` processes, ended after ``stop`` steps where that is not 0."""
    steps = arguments.steps or STEPS[workload]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [__file__, "--process", "--workload", workload, "--accumulation", str(accumulation)]
        command += ["--steps", str(steps), "--stop", str(stop), "--out", out]
        command += ["--limit", str(arguments.limit if workload == "large" else 0)]
        command += ["--tiny"] if arguments.tiny else []
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{workload} on {ranks}: {(done.stdout + done.stderr)[-4000:]}")
        return dict(json.loads((Path(out) / "result.json").read_text(encoding="utf-8")))


def require_agreement(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """End where one process with as many rows a step, the same ones, has other losses."""
    ranks = result["ranks"]
    alone = measure(arguments, result["workload"], 1, ACCUMULATION * ranks, CHECKED)
    apart = max(abs(one - other) / one for one, other in zip(alone["loss"], result["loss"], strict=True))
    if apart > AGREEMENT:
        sys.exit(f"{result['workload']}: losses {result['loss']} on {ranks}, {alone['loss']} on one: no speed counts.")


def main() -> None:
    """Measure everything, or be one process of a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2", help="numbers of processes")
    parser.add_argument("--workloads", default="full,chat,large")
    parser.add_argument("--steps", type=int, default=0, help="of every training; else by workload")
    parser.add_argument("--limit", type=float, default=30, help="GiB of each card for the divided model")
    parser.add_argument("--tiny", action="store_true", help="a model for CPUs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--process", action="store_true", help="be one process of a training; the rest is the driver")
    parser.add_argument("--workload", default="full")
    parser.add_argument("--accumulation", type=int, default=ACCUMULATION)
    parser.add_argument("--stop", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.process:
        train(arguments)
        return
    print(
        "| rows | processes | step s | tokens/s | times one | largest share | reduction ms | peak GiB each | losses |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for workload in arguments.workloads.split(","):
        alone = None
        for ranks in map(int, arguments.ranks.split(",")):
            if workload == "large" and ranks == 1 and not arguments.tiny:
                continue  # no card holds it
            result = measure(arguments, workload, ranks)
            if ranks > 1 and (workload != "large" or arguments.tiny):
                require_agreement(arguments, result)
            alone = result if ranks == 1 else alone
            times = f"{result['tokens_per_s'] / alone['tokens_per_s']:.2f}" if alone else ""
            cells = [
                workload,
                ranks,
                result["step_s"],
                f"{result['tokens_per_s']:,}",
                times,
                result["largest_share"],
                result["reduction_ms"],
            ]
            cells += [" ".join(map(str, result["peak_gib"])), " ".join(map(str, result["loss"]))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
            results.append(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
