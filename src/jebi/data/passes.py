"""One optimizer step's rows as passes: laid end to end without padding, common beginnings once, in as few as fit.

A token of one row and a token of another are held once when everything up to and including them is equal: the ids, and
what is to be learnt there. Its loss then counts as often as there are rows, each with its weight. Same sums, same
gradient, fewer products;
with a template of 110 tokens before 8 rows of 290, a third of the tokens need not be computed.

Shapes: T tokens of whole rows, U tokens held.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jebi.data.flat_rows import FlatRows
from jebi.models.unpadding import IGNORED
from jebi.nn.rows import Rows

Batch = dict[str, Any]
"""What the data loader yields: ``input_ids``, ``labels`` and ``shift_labels`` (1, T), per row ``lengths``, ``rows``.

Where tokens are weighed, ``shift_weights`` (1, T) float32 too: how much the loss at each position counts.

``labels`` and ``attention_mask`` are there for Trainer: without the one it counts no learnt tokens (``shift_labels``),
without the other it takes every EOS that pads elsewhere for padding.
"""


WHOLE_PER_HELD = 2
"""Most tokens of whole rows per held token of the limit: attention keeps its part of every row whole."""


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model together."""

    input_ids: Tensor
    """(1, U) token ids."""
    shift_labels: Tensor
    """(1, U) each position's next token, or -100 where nothing is learnt."""
    counts: Tensor
    """(1, U) float32, how much the loss at each token counts: the sum of its weights over the rows it stands in."""
    rows: Rows
    """Where the rows begin and what they share."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole rows."""
        return self.rows.starts[-1]


def collate(examples: list[dict[str, list[int]]]) -> Batch:
    """Lay the examples' rows end to end. Lengths and row numbers stay Python lists, so they stay on the host."""
    lengths = [length for example in examples for length in example["lengths"]]
    ids = _end_to_end((example["input_ids"] for example in examples), np.int64)
    labels = _end_to_end((example["labels"] for example in examples), np.int64)
    shifted = torch.full_like(labels, IGNORED)
    shifted[:-1] = labels[1:]
    last = [end - 1 for end in accumulate(lengths)]
    shifted[last] = IGNORED
    batch = {
        "input_ids": ids[None],
        "labels": labels[None],
        "shift_labels": shifted[None],
        "attention_mask": torch.ones_like(ids)[None],
        "lengths": lengths,
        "rows": [row for example in examples for row in example["row"]],
    }
    if any("weights" in example for example in examples):
        weighed = (example.get("weights") or [1] * len(example["input_ids"]) for example in examples)
        weights = _end_to_end(weighed, np.float32)
        # A position's loss is that of the next token.
        shifted_weights = torch.zeros_like(weights)
        shifted_weights[:-1] = weights[1:]
        shifted_weights[last] = 0
        batch["shift_weights"] = shifted_weights[None]
    return batch


def _end_to_end(rows: Iterable[Iterable[float]], dtype: type[np.generic]) -> Tensor:
    """Lists of numbers as one tensor; a sixth of the time that torch takes to read a list."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(rows), dtype))


def learnt_weight(batch: Batch) -> Tensor:
    """Scalar: how many tokens of a batch are learnt, or the sum of their weights; what a mean loss is divided by."""
    learnt = batch["shift_labels"] != IGNORED
    total: Tensor = batch["shift_weights"][learnt].sum() if "shift_weights" in batch else learnt.sum()
    return total


def flat_of(batch: Batch) -> FlatRows:
    """A batch's rows for what looks at flat ones."""
    ids, labels = (batch[name][0].cpu().numpy() for name in ("input_ids", "labels"))
    return FlatRows(ids, labels, np.array([0, *accumulate(batch["lengths"])]), np.array(batch["rows"]))


def longest(batches: list[Batch]) -> int:
    """Tokens of the batches' longest row."""
    return max((length for batch in batches for length in batch["lengths"]), default=0)


def cut(batches: list[Batch], tokens: int, share: bool = True) -> list[Pass]:
    """The batches' rows in passes of at most ``tokens`` held tokens; a longer row is a pass of its own.

    Which batch a row came in makes no difference. ``share=False`` holds every token of every row.
    """
    rows = sorted((row for batch in batches for row in _rows_of(batch)), key=_order)
    open_passes: list[_Filling] = []
    for row, weights in rows:
        for place in open_passes:
            common = place.common(row) if share else 0
            if place.fits(len(row), common, tokens):
                break
        else:
            place, common = _Filling(), 0
            open_passes.append(place)
        place.add(row, weights, common)
    return [filling.finish() for filling in open_passes]


def _order(row: tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]) -> tuple[bytes, bytes]:
    """Sorts rows as the lists of their numbers would: none is negative (`IGNORED` is made 0), the high bytes first."""
    return (row[0] - IGNORED).astype(">i8").tobytes(), row[1].astype(">f4").tobytes()


def _rows_of(batch: Batch) -> list[tuple["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]]:
    """Each row as (length, 2), id and label to be learnt at every token, and as (length,), each loss's weight."""
    pairs = torch.stack((batch["input_ids"][0], batch["shift_labels"][0]), dim=1).cpu().numpy()
    weights = batch["shift_weights"][0].cpu().numpy() if "shift_weights" in batch else np.ones(len(pairs), np.float32)
    ends = list(accumulate(batch["lengths"]))
    parts = [slice(end - length, end) for end, length in zip(ends, batch["lengths"])]
    return [(pairs[part], weights[part]) for part in parts]


@dataclass
class _Filling:
    """A pass being filled with rows in lexicographic order, so that a row's longest shared beginning is the last's."""

    held: list["np.ndarray[Any, Any]"] = field(default_factory=list)
    """New tokens of each row."""
    whole: list["np.ndarray[Any, Any]"] = field(default_factory=list)
    """For each row, the held tokens it is made of."""
    weights: list["np.ndarray[Any, Any]"] = field(default_factory=list)
    """For each row, how much the loss at each token counts."""
    last: "np.ndarray[Any, Any]" = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    size: int = 0
    whole_size: int = 0

    def fits(self, length: int, common: int, tokens: int) -> bool:
        held = self.size + length - common
        return held <= tokens and self.whole_size + length <= WHOLE_PER_HELD * tokens

    def add(self, row: "np.ndarray[Any, Any]", weights: "np.ndarray[Any, Any]", common: int) -> None:
        new = np.arange(self.size, self.size + len(row) - common)
        self.whole.append(np.concatenate((self.whole[-1][:common], new)) if common else new)
        self.held.append(row[common:])
        self.weights.append(weights)
        self.size += len(new)
        self.whole_size += len(row)
        self.last = row

    def common(self, row: "np.ndarray[Any, Any]") -> int:
        """Tokens at the beginning that are the last row's too, labels included."""
        length = min(len(row), len(self.last))
        differs = (row[:length] != self.last[:length]).any(axis=1)
        return int(differs.argmax()) if differs.any() else length

    def finish(self) -> Pass:
        pairs_U2 = torch.from_numpy(np.concatenate(self.held))
        whole_T = np.concatenate(self.whole)
        positions_T = torch.cat([torch.arange(len(row)) for row in self.whole])
        starts = (0, *accumulate(len(row) for row in self.whole))
        _, first_U = np.unique(whole_T, return_index=True)
        counts_U = np.bincount(whole_T, weights=np.concatenate(self.weights))
        if self.size == len(whole_T):
            rows = Rows(starts, positions_T)
        else:
            first = torch.from_numpy(first_U)
            rows = Rows(starts, positions_T[first], torch.from_numpy(whole_T), first)
        ids, labels = pairs_U2[None, :, 0].contiguous(), pairs_U2[None, :, 1].contiguous()
        return Pass(ids, labels, torch.from_numpy(counts_U).float()[None], rows)
