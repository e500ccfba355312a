"""Rows that are never trained on: answers with their labels, and the mean loss over them.

The same passes as training, never any logits, so whatever trains can be evaluated. Which model is asked is the
caller's affair.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation
from jebi.data.dealing import Ranks, passes_of
from jebi.data.encoding import Encoder, Written
from jebi.data.passes import Batch, Pass, learnt_weight, longest
from jebi.data.templates import Template
from jebi.models.unpadding import learnt_of


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
        "input_ids": part.input_ids.to(device, non_blocking=True),
        "rows": part.rows.to(device),
        "learnt": learnt_of(part.shift_labels, part.counts).to(device),
    }


def summed_loss(
    model: Model,
    batches: Iterable[Batch],
    tokens: int,
    label_smoothing: float = 0.0,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> tuple[float, float]:
    """The loss summed over all learnt tokens, and their number; the model is to be in evaluation mode.

    Where tokens are weighed, the sum of weighed losses and the sum of weights. Of several processes, which all read all
    rows, the loss is that of this one's share.
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    learnt = 0.0
    for batch in batches:
        learnt += float(learnt_weight(batch))
        share = model.shares_beginnings(longest([batch]))
        for part in passes_of([batch], tokens, share, ranks):
            inputs = inputs_of(part, model.device) | {"num_items_in_batch": 1, "label_smoothing": label_smoothing}
            with torch.no_grad():
                total += model(**inputs).loss.double()
    return float(total.item()), learnt


def answer_rows(
    rows: Iterable[Conversation], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Token rows in which only the answers and their end-of-turn tokens are labelled, in `data.rows`' columns.

    A row's own weights are not heeded: a comparison measures every answer alike.
    """
    encoder = Encoder(tokenizer, template.literals)
    made: list[dict[str, list[int]]] = []
    for number, row in enumerate(rows):
        hidden = encoder.special.hide(row)
        rendered = template.render(hidden, tuple(row.answers))
        spans = tuple((answer.start, answer.end, 1.0) for answer in rendered.answers)
        (tokens,) = encoder.encode([Written(rendered.text, hidden is not row, template.whole, spans)])
        ids, labels = tokens.ids[:max_length], tokens.labels[:max_length]
        made.append({"input_ids": ids, "labels": labels, "row": [number], "lengths": [len(ids)]})
    return made
