"""Greedy decoding on a CPU: jebi beside transformers (and PEFT), same weights, same prompt, same process.

The two take turns, so that a machine whose speed drifts treats them alike; the ratio is the median over the turns. No
speed is printed when the tokens differ.

    python benchmarks/decode_cpu.py [--tokens 64] [--turns 5]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jebi import FastLanguageModel

PROMPT = "Write a few sentences about the sea and the people who live by it."


def seconds(generate: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall time of one generation, and its tokens."""
    began = time.perf_counter()
    tokens = generate()
    return time.perf_counter() - began, tokens


def main() -> None:
    """Measure without and with an adapter and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    print("| float32, one row | transformers tokens/s | jebi tokens/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = FastLanguageModel.from_pretrained("smollm2", dtype=torch.float32, load_in_4bit=False)
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        messages = [{"role": "user", "content": PROMPT}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for adapted in (False, True):
            if adapted:
                from peft import PeftModel

                FastLanguageModel.get_peft_model(model).save_pretrained(Path(folder) / "adapter")
                theirs = PeftModel.from_pretrained(theirs, str(Path(folder) / "adapter"))
            FastLanguageModel.for_inference(model)
            theirs.eval()
            settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
            pairs = []
            for _ in range(args.turns + 1):
                their_time, their_tokens = seconds(lambda: theirs.generate(**inputs, **settings))  # noqa: B023
                our_time, our_tokens = seconds(lambda: model.generate(**inputs, **settings))  # noqa: B023
                if not torch.equal(their_tokens, our_tokens):
                    raise SystemExit("the tokens differ: no speed")
                pairs.append((args.tokens / their_time, args.tokens / our_time))
            theirs_rate, ours_rate = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
            ratio = statistics.median(ours / theirs for theirs, ours in pairs[1:])
            print(f"| {'with' if adapted else 'no'} adapter | {theirs_rate:.1f} | {ours_rate:.1f} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
