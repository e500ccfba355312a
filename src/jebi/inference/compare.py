"""Ask a base model and its tuned self the same questions, and take the loss of both on held-out answers.

One model is loaded: with its adapter switched off it is the base. What is found goes into a `Comparison`; reading
files and writing reports are the caller's.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation
from jebi.data.encoding import Encoder
from jebi.data.heldout import answer_rows, summed_loss
from jebi.data.passes import collate
from jebi.data.templates import Template
from jebi.errors import DataError
from jebi.inference.comparison import Answer, Comparison, Side
from jebi.inference.decline import RULE, declines
from jebi.inference.generation import generate
from jebi.models.hf import JebiForCausalLM

BATCH = 64
"""Questions answered at once: on two cores 64 rows take twice the time of 20."""
ORDINARY = 12
"""Held-out questions that are no refusals and are asked too, to see that the tuned model still answers them."""
PASS_TOKENS = 1024
HELDOUT_ROWS_PER_BATCH = 8


@dataclass(frozen=True)
class Questions:
    """What is asked."""

    harmful: list[Conversation]
    """Questions all of which ought to be declined."""
    heldout: list[Conversation]
    """Questions with answers, for the loss and for ordinary questions; may be empty."""

    def ordinary(self) -> list[Conversation]:
        """The first held-out rows whose own answer is no refusal."""
        return [row for row in self.heldout if not declines(row.last_answer)][:ORDINARY]


@dataclass
class _Said:
    """What one side said to every question."""

    texts: list[str]
    stopped: list[bool]
    tokens_per_s: float


def compare_models(
    model: JebiForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    questions: Questions,
    *,
    max_new_tokens: int,
    names: tuple[str, str],
    loss_curve: list[tuple[int, float]],
    settings: dict[str, object],
) -> Comparison:
    """Answers, losses and speeds of both sides.

    Args:
        model: the tuned model, ready for inference.
        tokenizer: its tokenizer.
        template: how a question becomes a prompt, as in training.
        questions: what to ask.
        max_new_tokens: where an answer is cut.
        names: the base's and the adapter's names, for the report.
        loss_curve: (step, loss) of the training.
        settings: shown in the report.

    Raises:
        DataError: there is nothing to ask.
    """
    asked = [(row, True) for row in questions.harmful] + [(row, False) for row in questions.ordinary()]
    if not asked:
        raise DataError("there are no questions to ask; look at --prompts.")
    prompts = Encoder(tokenizer, template.literals).prompts(template, [row.prompt for row, _ in asked])
    sides: dict[str, tuple[Side, _Said]] = {}
    with tqdm(total=2 * len(prompts), desc="Asking", unit="answer", file=sys.stderr) as bar:
        for name in ("base", "tuned"):
            with model.disable_adapter() if name == "base" else nullcontext():
                said = _answer(model, tokenizer, prompts, max_new_tokens, bar)
                loss, tokens = _heldout_loss(model, tokenizer, template, questions.heldout)
            sides[name] = Side(name, loss, tokens, said.tokens_per_s, None), said
    answers = [
        Answer(_question(row), harmful, base, tuned, base_stopped, tuned_stopped)
        for (row, harmful), base, tuned, base_stopped, tuned_stopped in zip(
            asked,
            sides["base"][1].texts,
            sides["tuned"][1].texts,
            sides["base"][1].stopped,
            sides["tuned"][1].stopped,
            strict=True,
        )
    ]
    return Comparison(*names, sides["base"][0], sides["tuned"][0], answers, loss_curve, settings, RULE)


def _answer(
    model: JebiForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int, bar: Any
) -> _Said:
    """Greedy answers, the longest prompts together, in the prompts' order."""
    texts, stopped = [""] * len(prompts), [False] * len(prompts)
    ends = model.generation_config.eos_token_id
    eos = set(ends if isinstance(ends, list) else [ends])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generated, seconds = 0, 0.0
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in part]}, return_tensors="pt").to(model.device)
        began = time.perf_counter()
        with torch.no_grad():
            output = generate(model, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
        seconds += time.perf_counter() - began
        for index, row in zip(part, output[:, inputs["input_ids"].shape[1] :].tolist()):
            end = next((n for n, token in enumerate(row) if token in eos), None)
            texts[index] = str(tokenizer.decode(row[:end], skip_special_tokens=True)).strip()
            stopped[index] = end is not None
            generated += len(row) if end is None else end + 1
        bar.update(len(part))
    return _Said(texts, stopped, generated / seconds)


def _heldout_loss(
    model: JebiForCausalLM, tokenizer: PreTrainedTokenizerBase, template: Template, rows: list[Conversation]
) -> tuple[float | None, int]:
    """Mean loss per token of the held-out answers."""
    if not rows:
        return None, 0
    made = answer_rows(rows, template, tokenizer, getattr(model, "max_seq_length", 2048))
    batches = (collate(made[i : i + HELDOUT_ROWS_PER_BATCH]) for i in range(0, len(made), HELDOUT_ROWS_PER_BATCH))
    total, tokens = summed_loss(model, batches, PASS_TOKENS)
    return (total / tokens if tokens else None), round(tokens)


def _question(row: Conversation) -> str:
    """What was asked last, as the report shows it."""
    return str(row.prompt.turns[-1].message()["content"])
