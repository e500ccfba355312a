"""Token rows as flat arrays, so that a check over millions of tokens is a few passes of numpy.

Packed sequences are taken apart again by their ``lengths``: a row here is a row of the user's.

Shapes: T tokens of all rows, R rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from jebi.models.unpadding import IGNORED

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Hashes: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class FlatRows:
    """Rows end to end."""

    ids: Ints
    """(T,) token ids."""
    labels: Ints
    """(T,) what is learnt at each token, -100 where nothing is."""
    starts: Ints
    """(R + 1,) where each row begins, and the end."""
    numbers: Ints
    """(R,) each row's number in the user's data set; pieces of one long row share it."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def lengths(self) -> Ints:
        """(R,) tokens of each row."""
        return np.diff(self.starts)

    @property
    def learnt(self) -> Bools:
        """(T,) whether a token is learnt; a row's first never is, since nothing precedes it."""
        learnt: Bools = self.labels != IGNORED
        learnt[self.starts[:-1][self.lengths > 0]] = False
        return learnt

    def row_of(self) -> Ints:
        """(T,) each token's row, from 0."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def counts(self, mask_T: Bools) -> Ints:
        """(R,) how many tokens of each row the mask holds."""
        counts: Ints = self._sums(mask_T.astype(np.int64))
        return counts

    def last(self, mask_T: Bools) -> Ints:
        """(R,) place of each row's last token that the mask holds, or -1."""
        places = np.maximum.accumulate(np.where(mask_T, np.arange(len(mask_T)), -1)) if len(mask_T) else mask_T
        found = np.full(len(self), -1, dtype=np.int64)
        filled = self.lengths > 0
        found[filled] = places[self.starts[1:][filled] - 1]
        return np.where(found >= self.starts[:-1], found, -1)

    def hashes(self, values_T: Ints, kept_T: Bools) -> Hashes:
        """(R,) one number for each row's kept values in their order; equal rows have equal numbers."""
        before = np.concatenate(([0], np.cumsum(kept_T)))
        place_T = before[:-1] - np.repeat(before[self.starts[:-1]], self.lengths)
        values, places = (_mix(np.arange(int(part.max(initial=0)) + 1)) for part in (values_T, place_T))
        mixed = values[np.where(kept_T, values_T, 0)] * (places[place_T] | np.uint64(1))
        mixed[~kept_T] = 0
        hashes: Hashes = self._sums(mixed)
        return hashes

    def cut(self, longest: int) -> "FlatRows":
        """The rows' first ``longest`` tokens."""
        kept = np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths) < longest
        starts = np.concatenate(([0], np.cumsum(np.minimum(self.lengths, longest))))
        return FlatRows(self.ids[kept], self.labels[kept], starts, self.numbers)

    def _sums(self, values_T: Any) -> Any:
        # Differences of running sums, which unlike reduceat are right for rows without a token.
        running = np.zeros(len(values_T) + 1, values_T.dtype)
        np.cumsum(values_T, out=running[1:])
        return np.diff(running[self.starts])


def flat(rows: Dataset | Iterable[dict[str, Any]]) -> FlatRows:
    """Token rows in `data.rows`' columns, or examples that have them; ``labels``, ``row`` and ``lengths`` may lack."""
    if isinstance(rows, Dataset):
        table = rows.with_format("arrow")[:]
        columns = {name: _list_column(table[name]) for name in table.column_names if name in _COLUMNS}
    else:
        examples = list(rows)
        names = [name for name in _COLUMNS if examples and name in examples[0]]
        columns = {name: _joined([example[name] for example in examples]) for name in names}
    nothing: Ints = np.empty(0, np.int64)
    ids, lengths = columns.get("input_ids", (nothing, nothing))
    if "lengths" in columns:
        lengths = columns["lengths"][0]
    labels = columns["labels"][0] if "labels" in columns else ids
    numbers = columns["row"][0] if "row" in columns else np.arange(len(lengths))
    return FlatRows(ids, labels, np.concatenate(([0], np.cumsum(lengths))), numbers)


_COLUMNS = ("input_ids", "labels", "row", "lengths")


def _list_column(column: pa.ChunkedArray) -> tuple[Ints, Ints]:
    """All values, and how many of them each row has."""
    values: Any = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    lengths: Any = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return _one(values), _one(lengths)


def _joined(lists: list[list[int]]) -> tuple[Ints, Ints]:
    lengths = np.array([len(values) for values in lists], np.int64)
    return np.fromiter(chain.from_iterable(lists), np.int64, count=int(lengths.sum())), lengths


def _one(arrays: list[Any]) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int64)


def _mix(numbers: Ints) -> Hashes:
    """The finaliser of splitmix64 (Steele et al., 2014): every bit of the input moves every bit of the output."""
    values = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
