"""Greedy decoding on a CPU: jebi beside transformers (PEFT, bitsandbytes), same weights, same prompt, same process.

The two take turns, so that a machine whose speed drifts treats them alike; the ratio is the median over the turns. In
float32 no speed is printed when the tokens differ; in bfloat16, and over 4 bits, which bitsandbytes multiplies in its
own way, rounding parts them sooner or later, and how many are equal is printed.

    python benchmarks/decode_cpu.py [--forms float32 bfloat16 4bit "4bit bfloat16"] [--tokens 64] [--turns 5]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jebi import FastLanguageModel

PROMPT = "Write a few sentences about the sea and the people who live by it."
FORMS = ("float32", "bfloat16", "4bit", "4bit bfloat16")


def seconds(generate: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall time of one generation, and its tokens."""
    began = time.perf_counter()
    tokens = generate()
    return time.perf_counter() - began, tokens


def theirs_of(folder: str, form: str) -> Any:
    """transformers' model of the checkpoint."""
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if "bfloat16" in form else torch.float32}
    if "4bit" in form:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=settings["dtype"],
        )
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def rates(ours: Any, theirs: Any, inputs: Any, args: argparse.Namespace) -> tuple[list[tuple[float, float]], float]:
    """Tokens a second of each turn, theirs and ours, and the share of equal tokens."""
    settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    pairs, equal = [], 0.0
    for _ in range(args.turns + 1):
        their_time, their_tokens = seconds(lambda: theirs.generate(**inputs, **settings))
        our_time, our_tokens = seconds(lambda: ours.generate(**inputs, **settings))
        equal = (their_tokens == our_tokens)[0, -args.tokens :].float().mean().item()
        pairs.append((args.tokens / their_time, args.tokens / our_time))
    return pairs[1:], equal


def main() -> None:
    """Measure without and with an adapter and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    print(
        "| one row | transformers tokens/s | jebi tokens/s | ratio | equal tokens |\n|---|---|---|---|---|", flush=True
    )
    for form in args.forms:
        dtype = torch.bfloat16 if "bfloat16" in form else torch.float32
        with tempfile.TemporaryDirectory() as folder:
            dense, tokenizer = FastLanguageModel.from_pretrained("smollm2", dtype=torch.float32, load_in_4bit=False)
            dense.save_pretrained(folder)
            model, _ = FastLanguageModel.from_pretrained("smollm2", dtype=dtype, load_in_4bit="4bit" in form)
            theirs = theirs_of(folder, form)
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": PROMPT}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            for adapted in (False, True):
                if adapted:
                    from peft import PeftModel

                    FastLanguageModel.get_peft_model(model).save_pretrained(Path(folder) / "adapter")
                    theirs = PeftModel.from_pretrained(theirs, str(Path(folder) / "adapter"))
                FastLanguageModel.for_inference(model)
                pairs, equal = rates(model, theirs.eval(), inputs, args)
                if equal < 1 and form == "float32":
                    raise SystemExit(f"{form}: the tokens differ: no speed")
                their_rate, our_rate = (statistics.median(column) for column in zip(*pairs, strict=True))
                ratio = statistics.median(ours / other for other, ours in pairs)
                name = f"{form}, {'with' if adapted else 'no'} adapter"
                print(f"| {name} | {their_rate:.1f} | {our_rate:.1f} | {ratio:.2f}x | {equal:.0%} |", flush=True)


if __name__ == "__main__":
    main()
