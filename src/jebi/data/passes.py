"""One optimizer step's rows as passes: laid end to end without padding, cut at row boundaries into as few as fit.

Shapes: T tokens of a batch or of a pass.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from jebi.data.packing import best_fit
from jebi.models.unpadding import IGNORED
from jebi.nn.rows import Rows, rows_from_lengths

Batch = dict[str, Any]
"""What the data loader yields: ``input_ids``, ``labels`` and ``shift_labels`` (1, T), per row ``lengths``, ``rows``.

``labels`` is there for Trainer, which counts a step's learnt tokens (in ``shift_labels``) only where it sees it.
"""


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together."""

    input_ids: Tensor
    """(1, T) token ids."""
    shift_labels: Tensor
    """(1, T) each position's next token, or -100 where nothing is learnt."""
    rows: Rows
    """Where the rows begin."""


def collate(examples: list[dict[str, list[int]]]) -> Batch:
    """Lay the examples' rows end to end. Lengths and row numbers stay Python lists, so they stay on the host."""
    lengths = [length for example in examples for length in example["lengths"]]
    ids = torch.tensor([token for example in examples for token in example["input_ids"]])
    labels = torch.tensor([label for example in examples for label in example["labels"]])
    shifted = torch.full_like(labels, IGNORED)
    shifted[:-1] = labels[1:]
    shifted[[end - 1 for end in accumulate(lengths)]] = IGNORED
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "shift_labels": shifted[None],
        "lengths": lengths,
        "rows": [row for example in examples for row in example["row"]],
    }


def cut(batches: list[Batch], tokens: int) -> list[Pass]:
    """The batches' rows in passes of at most ``tokens``; a longer row is a pass of its own."""
    ids_T = torch.cat([batch["input_ids"][0] for batch in batches])
    labels_T = torch.cat([batch["shift_labels"][0] for batch in batches])
    lengths = [length for batch in batches for length in batch["lengths"]]
    starts = [0, *accumulate(lengths)]
    return [_assemble(sorted(group), starts, ids_T, labels_T) for group in best_fit(lengths, tokens)]


def _assemble(group: list[int], starts: list[int], ids_T: Tensor, labels_T: Tensor) -> Pass:
    spans = [slice(starts[i], starts[i + 1]) for i in group]
    rows = rows_from_lengths([span.stop - span.start for span in spans], ids_T.device)
    ids, labels = (torch.cat([values[span] for span in spans])[None] for values in (ids_T, labels_T))
    return Pass(ids, labels, rows)
