"""Rows that are never trained on: answers with their labels, and the mean loss over them.

The same passes as training, never any logits, so whatever trains can be evaluated. Which model is asked is the
caller's affair.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from jebi.data.passes import Batch, Pass, cut, longest
from jebi.data.templates import Template
from jebi.models.unpadding import IGNORED, learnt_of


class Model(Protocol):
    """A model that returns a loss for a pass."""

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be."""
        ...

    def shares_beginnings(self, longest: int) -> bool:
        """Whether beginnings that rows of up to ``longest`` tokens have in common may be computed once."""
        ...

    def __call__(self, **inputs: Any) -> Any:
        """Return an object with ``loss``."""
        ...


def inputs_of(part: Pass, device: torch.device) -> dict[str, Any]:
    """A pass as the model's keywords, on its device."""
    return {
        "input_ids": part.input_ids.to(device),
        "rows": part.rows.to(device),
        "learnt": learnt_of(part.shift_labels, part.counts).to(device),
    }


def summed_loss(model: Model, batches: Iterable[Batch], tokens: int, label_smoothing: float = 0.0) -> tuple[float, int]:
    """The loss summed over all learnt tokens, and their number; the model is to be in evaluation mode."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    learnt = 0
    for batch in batches:
        learnt += int((batch["shift_labels"] != IGNORED).sum())
        share = model.shares_beginnings(longest([batch]))
        for part in cut([batch], tokens, share):
            inputs = inputs_of(part, model.device) | {"num_items_in_batch": 1, "label_smoothing": label_smoothing}
            with torch.no_grad():
                total += model(**inputs).loss.double()
    return float(total.item()), learnt


def answer_rows(
    rows: Iterable[dict[str, str]], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Token rows in which only the answer and its EOS are labelled, in `data.rows`' columns."""
    made: list[dict[str, list[int]]] = []
    eos, bos = str(tokenizer.eos_token), tokenizer.bos_token
    for number, row in enumerate(rows):
        text = template.row(row["instruction"], row["input"], row["output"], eos)
        prompt_end = len(template.prompt(row["instruction"], row["input"]))
        encoded = tokenizer(
            text,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            truncation=True,
            max_length=max_length,
        )
        spans = zip(encoded["input_ids"], encoded["offset_mapping"])
        labels = [token if start >= prompt_end else IGNORED for token, (start, _) in spans]
        ids: list[int] = encoded["input_ids"]
        made.append({"input_ids": ids, "labels": labels, "row": [number], "lengths": [len(ids)]})
    return made
