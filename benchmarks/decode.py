"""Prefill and decoding beside the rivals on one CUDA card: same checkpoint, prompts and adapter, each its own process.

    python benchmarks/decode.py --path CHECKPOINT --peers FOLDER --against unsloth,hf [--kernels] [--profile]

FOLDER is what `rivals.py` says. Greedy, behind an adapter of rank 16 on all seven projections, which jebi draws and the
rivals read. A rival makes fewer tokens (``--rival-new``), so that all are done within nine minutes on an H200; a
contender is stopped after ``--limit`` seconds, and what it has printed by then counts. ``--kernels`` adds what each
product reads a second beside a copy, ``--profile`` where a step's time goes (`decode_step.py`). Prints one table and
writes one JSON file. Without a card ``--device cpu --against ""`` runs jebi alone, to see that the script works.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rivals

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMPARED = 16
"""Tokens of the first answer that are compared."""


@dataclass(frozen=True)
class Case:
    """Rows answered at once, and tokens of each prompt."""

    rows: int
    prompt: int


@dataclass
class Contender:
    """A model that is ready to answer."""

    name: str
    model: Any
    load_s: float
    """From the process's start of imports to a loaded model."""
    warm_up_s: float = 0.0
    """Of `for_inference` for one row."""
    warm_up_all_s: float = 0.0
    """For all numbers of rows, one row's included."""


def jebi(arguments: argparse.Namespace) -> Contender:
    """jebi's model; it writes the adapter too."""
    began = time.time()
    from jebi import FastLanguageModel  # first: what it imports then loads while the garbage collector rests

    four, eight = (arguments.quant == bits for bits in ("4bit", "8bit"))
    import torch

    from jebi.adapters.peft_files import adapter_tensors

    if arguments.no_overlap:
        from jebi.kernels.gpu import dependent

        dependent.ENABLED = False
    model, _ = FastLanguageModel.from_pretrained(
        arguments.path, max_seq_length=8192, load_in_4bit=four, load_in_8bit=eight, device=arguments.device
    )
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            # A random model's answers hang by a thread: an adapter that matters, and does not drown it.
            tensor.add_(0.002 * torch.randn(tensor.shape, generator=drawn).to(tensor))
    model.save_pretrained(adapter_of(arguments))
    loaded, started = time.time() - began, time.time()
    FastLanguageModel.for_inference(model)
    warm = time.time() - started
    if (rows := sorted({case.rows for case in cases(arguments)})) != [1]:
        FastLanguageModel.for_inference(model, rows=rows)
    return Contender("jebi", model, loaded, warm, time.time() - started)


def unsloth(arguments: argparse.Namespace) -> Contender:
    """Unsloth's, as its notebooks load it."""
    began = time.time()
    from unsloth import FastLanguageModel

    four, eight = (arguments.quant == bits for bits in ("4bit", "8bit"))
    model, _ = FastLanguageModel.from_pretrained(
        model_name=arguments.path, max_seq_length=8192, dtype=None, load_in_4bit=four, load_in_8bit=eight
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407
    )
    _put_adapter(model, arguments)
    loaded, started = time.time() - began, time.time()
    FastLanguageModel.for_inference(model)
    return Contender("unsloth", model, loaded, time.time() - started)


def hf(arguments: argparse.Namespace) -> Contender:
    """transformers, PEFT and bitsandbytes."""
    began = time.time()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": torch.bfloat16, "attn_implementation": "sdpa", "device_map": {"": 0}}
    if arguments.quant == "4bit":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if arguments.quant == "8bit":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.path, **settings)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    _put_adapter(model, arguments)
    return Contender("hf", model.eval(), time.time() - began)


def _put_adapter(model: Any, arguments: argparse.Namespace) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(adapter_of(arguments) / "adapter_model.safetensors"))


CONTENDERS: dict[str, Callable[[argparse.Namespace], Contender]] = {"jebi": jebi, "unsloth": unsloth, "hf": hf}


def run(arguments: argparse.Namespace) -> None:
    """Be one contender: print one line, RESULT and a JSON object, a case."""
    contender = CONTENDERS[arguments.run](arguments)
    import torch

    with torch.inference_mode():
        for number, case in enumerate(cases(arguments)):
            print("RESULT " + json.dumps(measured(contender, case, arguments, compared=number == 0)), flush=True)
    if arguments.run == "jebi" and arguments.device == "cuda" and (arguments.kernels or arguments.profile):
        import decode_step

        rows = [int(number) for number in arguments.rows.split(",")]
        if arguments.kernels:
            print("KERNELS " + json.dumps(decode_step.bandwidths(contender.model, rows)), flush=True)
        if arguments.profile:
            for count in rows:
                said = decode_step.profiled(contender.model, prompt(contender.model, Case(count, 128)))
                print("PROFILE " + json.dumps(said), flush=True)


def measured(contender: Contender, case: Case, arguments: argparse.Namespace, compared: bool) -> dict[str, Any]:
    """Times of one case; the prompt's is that of one token, which the rest is taken from."""
    import torch

    on_card, model, new = arguments.device == "cuda", contender.model, arguments.new
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    ids = prompt(model, case)

    def timed(tokens: int, ids: Any = ids) -> float:
        if on_card:
            torch.cuda.synchronize()
        start = time.perf_counter()
        answered(model, ids, tokens)
        if on_card:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = timed(1)
    timed(min(8, new))
    times = [(timed(1), timed(1 + new)) for _ in range(arguments.turns)]
    prefill = statistics.median(one for one, _ in times)
    step = (statistics.median(both for _, both in times) - prefill) / new
    result = {
        "impl": contender.name,
        "quant": arguments.quant,
        "bs": case.rows,
        "prompt": case.prompt,
        "prefill_ms": round(prefill * 1e3, 2),
        "first_call_ms": round(first * 1e3, 2),
        # Of a length that came never before: whatever is compiled or planned for a length shows.
        "new_length_ms": round(timed(1, prompt(model, Case(case.rows, case.prompt + 3))) * 1e3, 2),
        "decode_tok_s": round(case.rows / step, 1),
        "step_ms": round(step * 1e3, 3),
        "load_s": round(contender.load_s, 1),
        "warm_up_s": round(contender.warm_up_s, 2),
        "warm_up_all_s": round(contender.warm_up_all_s, 2),
        "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_card else None,
    }
    if compared:
        result["tokens"] = answered(model, ids, min(COMPARED, new))[0, case.prompt :].tolist()
    return result


def prompt(model: Any, case: Case) -> Any:
    """Equal rows of random tokens."""
    import torch

    drawn, limit = random.Random(1), min(model.config.vocab_size, 128001) - 1
    row = [limit, *(drawn.randrange(0, limit) for _ in range(case.prompt - 1))]
    return torch.tensor([row] * case.rows, device=model.device)


def answered(model: Any, ids: Any, new: int) -> Any:
    """Prompts and answers of exactly so many tokens: what would end one is no row's to make."""
    import torch

    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 2}
    return model.generate(input_ids=ids, max_new_tokens=new, eos_token_id=model.config.vocab_size, **settings)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Every number of rows with every prompt."""
    return [Case(int(n), int(p)) for p in arguments.prompts.split(",") for n in arguments.rows.split(",")]


def adapter_of(arguments: argparse.Namespace) -> Path:
    """Where the adapter lies."""
    return Path(f"{arguments.path.rstrip('/')}-adapter")


def results_of(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a contender's process printed, and what went wrong."""
    command = [sys.executable, __file__, "--run", name, "--path", arguments.path, "--quant", arguments.quant]
    command += ["--rows", arguments.rows, "--prompts", arguments.prompts, "--device", arguments.device]
    command += ["--new", str(arguments.new if name == "jebi" else arguments.rival_new)]
    command += ["--turns", str(arguments.turns if name == "jebi" else 2)]
    command += [f"--{flag.replace('_', '-')}" for flag in ("kernels", "profile", "no_overlap") if vars(arguments)[flag]]
    environment = dict(os.environ) if name == "jebi" else rivals.environment(Path(arguments.peers))
    environment |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=arguments.limit)
        printed, wrong = done.stdout, (done.stderr or done.stdout)[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        wrong = f"stopped after {arguments.limit} s"
    found = []
    for kind, _, rest in (line.partition(" ") for line in printed.splitlines()):
        if kind in ("RESULT", "KERNELS", "PROFILE"):
            found.append(json.loads(rest) if kind == "RESULT" else {"impl": name, kind.lower(): json.loads(rest)})
    return [*found, {"impl": name, "failed": wrong}] if wrong else found


def table(results: list[dict[str, Any]], rival: str) -> str:
    """One line a case; ratios are to the rival in the same one."""
    lines = [
        "| run | prompt | rows | prefill ms | ratio | new length ms | tokens/s | ratio | peak GiB |",
        "|" + "---|" * 9,
    ]
    timed = [result for result in results if "prefill_ms" in result]
    for result in sorted(timed, key=lambda r: (r["prompt"], r["bs"])):
        same = [r for r in timed if r["impl"] == rival and (r["bs"], r["prompt"]) == (result["bs"], result["prompt"])]
        prefill = f"{same[0]['prefill_ms'] / result['prefill_ms']:.2f}" if same else ""
        speed = f"{result['decode_tok_s'] / same[0]['decode_tok_s']:.2f}" if same else ""
        lines.append(
            f"| {result['impl']} | {result['prompt']} | {result['bs']} | {result['prefill_ms']:.1f} | {prefill} | "
            f"{result['new_length_ms']:.1f} | {result['decode_tok_s']:,.1f} | {speed} | {result['peak_alloc_gib']} |"
        )
    for result in results:
        if "tokens" in result:
            warm = f"warm-up {result['warm_up_s']} s, for all numbers of rows {result['warm_up_all_s']} s"
            said = f"load {result['load_s']} s, {warm}, first tokens {result['tokens']}"
            lines.append(f"{result['impl']}: {said}")
        if "failed" in result:
            lines.append(f"{result['impl']} failed: {result['failed'].strip()}")
        lines += [str(line) for part in ("kernels", "profile") for line in result.get(part, [])]
    return "\n".join(lines)


def main() -> None:
    """Measure everyone, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="/tmp/m8b", help="the checkpoint, which is made where there is none")
    parser.add_argument("--peers", default=".peers")
    parser.add_argument("--against", default="unsloth,hf")
    parser.add_argument("--quant", default="4bit", choices=("4bit", "8bit", "16bit"))
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--prompts", default="128,4096")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rival-new", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--limit", type=float, default=230, help="seconds that a contender has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-overlap", action="store_true", help="no kernel begins before the one before it ends")
    parser.add_argument("--json", help="by default docs/benchmarks/decode.json, or decode_16bit.json, decode_8bit.json")
    parser.add_argument("--run", choices=CONTENDERS, help="be this contender; the rest is the driver")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments)
        return
    rivals.make_checkpoint(Path(arguments.path), Path(arguments.peers))
    ending = "" if arguments.quant == "4bit" else f"_{arguments.quant}"
    path = Path(arguments.json or f"docs/benchmarks/decode{ending}.json")
    results: list[dict[str, Any]] = []
    for name in ["jebi", *(name for name in arguments.against.split(",") if name)]:
        results += results_of(name, arguments)
        print(json.dumps(results[-1])[:300], file=sys.stderr, flush=True)
        # After each of them, so that what is stopped has not measured for nothing.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, arguments.against.split(",")[0]))


if __name__ == "__main__":
    main()
