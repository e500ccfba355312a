"""Prefill and decoding beside the rivals on one CUDA card: same checkpoint, prompts and adapter, each its own process.

    python benchmarks/decode.py --path CHECKPOINT --peers FOLDER --against unsloth,hf

FOLDER is as in `vs_peers.py`: ``peers.py`` makes the checkpoint and runs a rival, ``site`` goes in front of the rivals'
module path. Greedy, 128 new tokens, behind an untrained adapter of rank 16 on all seven projections. Prints one table
and writes one JSON file. ``--bandwidth`` adds what share of the measured copy bandwidth reading the weights once a
token would be. Without a card ``--device cpu`` runs jebi alone, to see that the script works.
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
from pathlib import Path
from typing import Any

NEW = 128
TURNS = 3


@dataclass(frozen=True)
class Case:
    """Rows answered at once, and tokens of each prompt."""

    rows: int
    prompt: int


def run_jebi(arguments: argparse.Namespace) -> None:
    """Measure in this process and print one line, RESULT and a JSON object, a case."""
    from jebi import FastLanguageModel  # first: what it imports then loads while the garbage collector rests

    began = time.time()
    import torch

    on_card = arguments.device == "cuda"

    def wait() -> None:
        if on_card:
            torch.cuda.synchronize()

    model, _ = FastLanguageModel.from_pretrained(
        arguments.path, max_seq_length=8192, load_in_4bit=arguments.quant == "4bit", device=arguments.device
    )
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    loaded, started = time.time() - began, time.time()
    FastLanguageModel.for_inference(model)
    wait()
    warm = time.time() - started
    for case in cases(arguments):
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        drawn, known = random.Random(1), model.model.shape.vocabulary
        limit = min(known, 128000)
        row = [limit - 1, *(drawn.randrange(0, limit) for _ in range(case.prompt - 1))]
        ids = torch.tensor([row] * case.rows, device=model.device)

        def timed(new: int, ids: torch.Tensor = ids) -> float:
            wait()
            start = time.perf_counter()
            settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 2}
            model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **settings)
            wait()
            return time.perf_counter() - start

        first = timed(1)
        timed(min(16, arguments.new))
        times = [(timed(1), timed(1 + arguments.new)) for _ in range(TURNS)]
        prefill = statistics.median(one for one, _ in times)
        step = (statistics.median(both for _, both in times) - prefill) / arguments.new
        result = {
            "impl": "jebi",
            "quant": arguments.quant,
            "bs": case.rows,
            "prompt": case.prompt,
            "prefill_ms": round(prefill * 1e3, 2),
            "first_call_ms": round(first * 1e3, 2),
            "decode_tok_s": round(case.rows / step, 1),
            "step_ms": round(step * 1e3, 3),
            "load_s": round(loaded, 1),
            "warm_up_s": round(warm, 2),
            "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_card else None,
        }
        if arguments.bandwidth and on_card:
            result |= bandwidth(model, step)
        print("RESULT " + json.dumps(result), flush=True)


def bandwidth(model: Any, step: float) -> dict[str, float]:
    """Bytes of the weights over a step's time, beside a large copy's (read and written)."""
    import torch

    tensors = [*model.parameters(), *model.buffers()]
    read = sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors}.values())
    source = torch.empty(2**29, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        target.copy_(source)
    torch.cuda.synchronize()
    copied = 2 * 20 * source.nbytes / (time.perf_counter() - start)
    return {"weights_gb": round(read / 1e9, 3), "read_gb_s": round(read / step / 1e9), "copy_gb_s": round(copied / 1e9)}


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every number of rows with every prompt."""
    return [Case(int(n), int(p)) for p in arguments.prompts.split(",") for n in arguments.rows.split(",")]


def results_of(command: list[str], site: Path | None, named: dict[str, Any]) -> list[dict[str, Any]]:
    """What a process printed, or what went wrong."""
    environment = dict(os.environ)
    if site is not None:
        environment["PYTHONPATH"] = f"{site}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == 0 and found:
        return found
    return [*found, named | {"failed": (done.stderr or done.stdout)[-2000:]}]


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one contender: jebi's in one process, a rival's each in its own."""
    if name == "jebi":
        command = [sys.executable, __file__, "--jebi", "--path", arguments.path, "--quant", arguments.quant]
        command += ["--rows", arguments.rows, "--prompts", arguments.prompts, "--device", arguments.device]
        command += ["--new", str(arguments.new), *(["--bandwidth"] if arguments.bandwidth else [])]
        return results_of(command, None, {"impl": name, "bs": 0, "prompt": 0})
    peers, made = Path(arguments.peers), []
    for case in cases(arguments):
        command = [sys.executable, str(peers / "peers.py"), "infer", "--path", arguments.path, "--impl", name]
        command += ["--quant", arguments.quant, "--bs", str(case.rows), "--prompt", str(case.prompt), "--seq", "8192"]
        made += results_of(command, peers / "site", {"impl": name, "bs": case.rows, "prompt": case.prompt})
    return made


def table(results: list[dict[str, Any]], rival: str) -> str:
    """One line a run; ratios are to the rival in the same case."""
    lines = ["| run | prompt | rows | prefill ms | ratio | tokens/s | ratio | peak GiB | warm-up s |", "|" + "---|" * 9]
    for result in sorted(results, key=lambda r: (r["prompt"], r["bs"])):
        head = f"| {result['impl']} | {result['prompt']} | {result['bs']} |"
        if "failed" in result:
            lines.append(f"{head} failed: {result['failed'].strip().splitlines()[-1][:80]} |" + " |" * 5)
            continue
        same = [r for r in results if r["impl"] == rival and (r["bs"], r["prompt"]) == (result["bs"], result["prompt"])]
        other = next((r for r in same if "failed" not in r), None)
        prefill = f"{other['prefill_ms'] / result['prefill_ms']:.2f}" if other else ""
        speed = f"{result['decode_tok_s'] / other['decode_tok_s']:.2f}" if other else ""
        lines.append(
            f"{head} {result['prefill_ms']:.1f} | {prefill} | {result['decode_tok_s']:,.1f} | {speed} | "
            f"{result.get('peak_alloc_gib')} | {result.get('warm_up_s', '')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure everyone, or be jebi."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="/tmp/m8b", help="the checkpoint, which is made where there is none")
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--against", default="unsloth,hf")
    parser.add_argument("--quant", default="4bit", help="4bit or 16bit")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--prompts", default="128,4096")
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bandwidth", action="store_true")
    parser.add_argument("--json", default="docs/benchmarks/decode.json")
    parser.add_argument("--jebi", action="store_true", help="run jebi in this process; the rest is the driver")
    arguments = parser.parse_args()
    if arguments.jebi:
        run_jebi(arguments)
        return
    if not Path(arguments.path).is_dir():
        make = [sys.executable, str(Path(arguments.peers) / "peers.py"), "make", "--path", arguments.path]
        subprocess.run([*make, "--tok", str(Path(arguments.peers) / "tok")], check=True, capture_output=True)
    results: list[dict[str, Any]] = []
    for name in [*(name for name in arguments.against.split(",") if name), "jebi"]:
        results += measure(name, arguments)
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, arguments.against.split(",")[0]))


if __name__ == "__main__":
    main()
