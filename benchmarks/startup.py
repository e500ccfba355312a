"""Where the start of a training goes: one line a part, from the process's start to its end.

    python benchmarks/startup.py --path CHECKPOINT [--steps 5] [--json FILE]

The parts are those of the tutorial's script, in a process of its own, on rows of drawn tokens (log-normal, median 180).
Below them: what lies within these parts (Triton's compilations, the tokenizer), and how fast the checkpoint's bytes
reach the device, staged and from where the file is mapped. For cold figures, drop the file cache before
(``echo 3 > /proc/sys/vm/drop_caches``) and set TRITON_CACHE_DIR to an empty folder.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


class Clock:
    """Seconds of each part, in order, since the process was started."""

    def __init__(self, began: float):
        self._last = began
        self.parts: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """The part that has just ended."""
        now = time.time()
        self.parts[part], self._last = round(now - self._last, 3), now


def train(path: str, steps: int, began: float) -> dict[str, Any]:
    """The tutorial's job in this process."""
    clock = Clock(began)
    clock.mark("Python")
    from jebi import FastLanguageModel

    clock.mark("import FastLanguageModel")
    from jebi import SFTConfig, SFTTrainer

    clock.mark("import SFTTrainer")
    import torch

    compilations = watch_triton()
    model, tokenizer = FastLanguageModel.from_pretrained(path, max_seq_length=2048, load_in_4bit=True)
    finish(torch)
    clock.mark("from_pretrained")
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    finish(torch)
    clock.mark("get_peft_model")
    from datasets import Dataset
    from transformers import TrainerCallback

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark("train: until the first step")

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            finish(torch)
            if state.global_step <= 3:
                clock.mark(f"train: step {state.global_step}")

    drawn = random.Random(0)
    lengths = [int(min(max(drawn.lognormvariate(5.2, 0.6), 24), 2048)) for _ in range(8 * steps)]
    rows = [[drawn.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]
    clock.mark("rows drawn")
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            max_seq_length=2048,
            args=settings(SFTConfig, output, steps),
            callbacks=[Steps()],
        )
        clock.mark("SFTTrainer")
        trainer.train()
        clock.mark("train: the rest")
        trainer.save_model()
        clock.mark("save")
    within = {"Triton compilations": len(compilations), "Triton seconds": round(sum(compilations), 3)}
    return {"parts": clock.parts, "within": within, "ended": time.time()}


def settings(kind: Any, output: str, steps: int) -> Any:
    """The tutorial's arguments."""
    import torch

    return kind(
        output_dir=output,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        warmup_steps=min(5, steps),
        max_steps=steps,
        learning_rate=2e-4,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        optim="adamw_8bit",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        allow=["missing-bos", "missing-eos"],  # rows of drawn tokens
    )


def finish(torch: Any) -> None:
    """Wait for the card."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def watch_triton() -> list[float]:
    """Seconds of each kernel that is compiled from now on; those found in Triton's cache do not count."""
    compilations: list[float] = []
    try:
        from triton import knobs
    except ImportError:
        return compilations

    def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compilations.append(times.total / 1e6)

    knobs.compilation.listener = listen
    return compilations


def reading(path: str) -> dict[str, float]:
    """Gigabytes a second onto the device, once the files are in memory; and the seconds that a tokenizer takes."""
    import torch

    from jebi.models.device import default_device
    from jebi.models.files import find
    from jebi.models.staging import staged

    device, files = default_device(), find(path)
    torch.empty(1, device=device)
    figures = {}
    began = time.perf_counter()
    files.tokenizer()
    figures["tokenizer s"] = time.perf_counter() - began
    for name in ("first, staged", "staged", "mapped"):
        tensors = staged(files.tensors(), device) if "staged" in name else files.tensors()
        done, began = 0, time.perf_counter()
        for stored in tensors:
            done += stored.read().to(device, copy=device.type == "cpu").nbytes
        finish(torch)
        figures[f"{name} GB/s"] = done / 1e9 / (time.perf_counter() - began)
    return {name: round(figure, 3) for name, figure in figures.items()}


def main() -> None:
    """Measure in processes of their own and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="a checkpoint folder")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--part", choices=["train", "reading"], help="run this part here; the rest is the driver")
    parser.add_argument("--began", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.part:
        trains = arguments.part == "train"
        here = train(arguments.path, arguments.steps, arguments.began) if trains else reading(arguments.path)
        print("RESULT " + json.dumps(here), flush=True)
        return
    command = [sys.executable, __file__, "--path", arguments.path, "--steps", str(arguments.steps)]
    began = time.time()
    result = measure([*command, "--part", "train", "--began", str(began)])
    result["parts"]["end of the process"] = round(time.time() - result.pop("ended"), 3)
    result["parts"]["all"] = round(time.time() - began, 3)
    result["reading"] = measure([*command, "--part", "reading"])
    for group in result.values():
        print("\n".join(f"{name:32s} {figure:8.3f}" for name, figure in group.items()) + "\n")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(command: list[str]) -> Any:
    """The RESULT of a process."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(done.stderr or done.stdout)
    return json.loads(lines[-1][7:])


if __name__ == "__main__":
    main()
