"""Evaluates jebi's model and transformers' with lm-eval, for `test_lm_eval`: ``evaluate_twins.py FOLDER ADAPTER``.

Two tasks made on the spot, one of likelihoods and one of generated text. Writes both models' results as JSON to stdout.
"""

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jebi import FastLanguageModel

ROWS = [
    {"question": f"What is {number} and {number}?", "options": [f" {2 * number}", f" {2 * number + 1} or so"]}
    for number in range(6)
]
COMMON: dict[str, Any] = {
    "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
TASKS: list[dict[str, Any]] = [
    COMMON
    | {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "0",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    COMMON
    | {
        "task": "tiny_writing",
        "output_type": "generate_until",
        "doc_to_target": "{{options[0]}}",
        "generation_kwargs": {"max_gen_toks": 8, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
]


def results(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Scores, and each sample's answers."""
    found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2), tasks=TASKS, bootstrap_iters=0)
    metrics = {
        f"{task}/{name}": float(value)
        for task, scores in found["results"].items()
        for name, value in scores.items()
        if isinstance(value, float)
    }
    answers = {task: [sample["filtered_resps"] for sample in samples] for task, samples in found["samples"].items()}
    return {"metrics": metrics, "answers": answers}


def main(folder: str, adapter: str) -> None:
    """Evaluate both."""
    ours, tokenizer = FastLanguageModel.from_pretrained(folder, 128, torch.float32, False, device="cpu")
    FastLanguageModel.for_inference(FastLanguageModel.put_adapter(ours, adapter))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, adapter)
    print(json.dumps([results(model, tokenizer) for model in (ours, theirs)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
