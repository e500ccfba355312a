"""A data set to rows of token ids: read and written as its format and template say, tokenised once, cut to length.

`data.writing` makes the texts and `data.encoding` the tokens; here they are put together over a whole data set or a
stream. Passes and packing come after.
"""

import logging
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from jebi.data.cache import place
from jebi.data.encoding import Tokens
from jebi.data.preparation import UNCUT, Learn, Preparation
from jebi.data.writing import ConversationWriter, TextWriter, writer_for
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | IterableDataset

TOKEN_COLUMNS = ("input_ids", "labels", "row", "lengths")
"""What tokenised rows have; where rows are weighed, ``weights`` too."""


def tokenize(dataset: Rows, tokenizer: PreTrainedTokenizerBase, how: Preparation) -> Rows:
    """A data set of `TOKEN_COLUMNS`, whatever the input had; ``row`` is a row's number, counted from 0.

    A data set that has ``input_ids`` already is taken as it is, with its ``labels`` or TRL's ``completion_mask`` and
    ``assistant_masks`` where it has them, and without the padding that its ``attention_mask`` shows. Rows with nothing
    to learn are left out. ``weights``, how much each token's loss counts, is there where a row or an answer is weighed.

    Raises:
        ConfigError: a setting is impossible.
        DataError: the columns fit no format, a row cannot be read, no rows, or none left with anything to learn.
    """
    if how.max_length < 1:
        raise ConfigError(f"max_seq_length must be at least 1, not {how.max_length}; 2048 is usual.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"the rows must be a data set of the datasets package, not {type(dataset).__name__}: "
            "make one with Dataset.from_list(rows)."
        )
    dataset = dataset.with_format(None)
    columns = columns_of(dataset)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError("the data set is empty.")
    if how.formatting_func is None and set(TOKEN_COLUMNS) <= set(columns):
        return dataset
    if how.formatting_func is None and how.format is None and "input_ids" in columns:
        encode: Any = _TakeIds(how.max_length, how.learn)
    else:
        first = next(iter(dataset), None)
        if first is None:
            raise DataError("the data set is empty.")
        encode = _Encode(writer_for(first, columns, tokenizer, how), "weight" in columns)
    settings: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
    if isinstance(dataset, IterableDataset):
        if isinstance(encode, _Encode):
            encode = replace(encode, columns=tuple(columns))
        return dataset.map(encode, features=_features(encode.weighs), **settings).remove_columns("cut")
    settings.update(num_proc=_useful_workers(how.workers, len(dataset)), desc="Tokenizing")
    settings.update(place(dataset, tokenizer, encode.writer if isinstance(encode, _Encode) else how.max_length))
    rows = dataset.map(encode, features=_features(encode.weighs), **settings)
    if len(rows) == 0:
        within = f" within max_seq_length={how.max_length}: raise it, or see" if how.max_length < UNCUT else ": see"
        raise DataError(f"no row is left: none can be read and has anything to learn{within} what the template writes.")
    _tell(rows, len(dataset), how)
    if encode.weighs and not any(rows["weighed"]):
        rows = rows.remove_columns("weights")
    return rows.remove_columns([name for name in ("cut", "weighed") if name in rows.column_names])


def columns_of(dataset: Rows) -> list[str]:
    """Names of its columns; a stream may have to be asked for its first row."""
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if not columns and isinstance(dataset, IterableDataset):
        raise DataError("the data set is empty.")
    return list(columns)


@dataclass(frozen=True)
class _Encode:
    """Columns of several rows to columns of tokens."""

    writer: ConversationWriter | TextWriter
    weighs_rows: bool
    columns: tuple[str, ...] | None = None
    """A stream's columns as its first row has them; None where they are known."""

    @property
    def weighs(self) -> bool:
        """Whether a row or an answer may have a weight of its own."""
        return self.weighs_rows or (isinstance(self.writer, ConversationWriter) and self.writer.form.weighs_turns)

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        how = self.writer.how
        if self.columns is not None and (late := batch.keys() - set(self.columns)):
            raise DataError(
                f"column '{min(late)}' comes up in rows {indices[0]} to {indices[-1]} of the stream, but its first row "
                "lacks it: write it there too, null if need be."
            )
        written = self.writer.write(batch, indices)
        made = self.writer.encoder.encode([row for _, row in written])
        return _columns(made, [how.first_row + number for number, _ in written], how.max_length, self.weighs)


@dataclass(frozen=True)
class _TakeIds:
    """Token ids that are there already, with their labels or with TRL's masks."""

    max_length: int
    learn: Learn
    weighs: bool = False

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        ids = batch["input_ids"]
        labels = batch.get("labels") or self._masked(batch)
        for number, row, learnt in zip(indices, ids, labels):
            if len(row) != len(learnt):
                raise DataError(f"row {number} has {len(row)} input_ids and {len(learnt)} labels; give each token one.")
        if masks := batch.get("attention_mask"):
            ids, labels = ([list(compress(row, mask)) for row, mask in zip(rows, masks)] for rows in (ids, labels))
        made = [Tokens(row, learnt, []) for row, learnt in zip(ids, labels)]
        return _columns(made, indices, self.max_length, weighs=False)

    def _masked(self, batch: dict[str, list[Any]]) -> list[list[int]]:
        """The ids, but for what a mask leaves out; as in TRL, ``assistant_masks`` holds whatever is to be learnt."""
        names = ("assistant_masks",) if self.learn == "all" else ("assistant_masks", "completion_mask")
        masks = [batch[name] for name in names if name in batch]
        if not masks and self.learn in ("answers", "last_answer"):
            raise ConfigError(
                "token ids do not say where their answers are: give labels, completion_mask or assistant_masks too."
            )
        return [
            [token if all(kept) else IGNORED for token, *kept in zip(row, *rows)]
            for row, *rows in zip(batch["input_ids"], *masks)
        ]


def _columns(made: list[Tokens], numbers: list[int], max_length: int, weighs: bool) -> dict[str, list[Any]]:
    """Cut to length; rows that teach nothing are left out. No row teaches its first token, which nothing precedes."""
    kept = [(number, row) for number, row in zip(numbers, made) if any(n != IGNORED for n in row.labels[1:max_length])]
    columns: dict[str, list[Any]] = {
        "input_ids": [row.ids[:max_length] for _, row in kept],
        "labels": [row.labels[:max_length] for _, row in kept],
        "row": [[number] for number, _ in kept],
        "lengths": [[min(len(row.ids), max_length)] for _, row in kept],
        "cut": [len(row.ids) > max_length for _, row in kept],
    }
    if weighs:
        columns["weights"] = [(row.weights or [1.0] * len(row.ids))[:max_length] for _, row in kept]
        columns["weighed"] = [bool(row.weights) for _, row in kept]
    return columns


def _features(weighs: bool) -> Features:
    """Types of the columns, said beforehand so that a batch of which nothing is left has them too."""
    tokens = {name: List(Value("int32")) for name in ("input_ids", "labels", "lengths")}
    weights = {"weights": List(Value("float32")), "weighed": Value("bool")} if weighs else {}
    return Features(tokens | {"row": List(Value("int64")), "cut": Value("bool")} | weights)


def _tell(rows: Dataset, given: int, how: Preparation) -> None:
    """Say how many rows were cut or left out; a cut row has lost its end, EOS included."""
    if cut := sum(rows["cut"]):
        logger.warning(f"{cut} of {given} rows are longer than max_seq_length={how.max_length} and were cut.")
    if left_out := given - len(rows):
        within = " within max_seq_length" if how.max_length < UNCUT else ""
        unread = "cannot be read or " if how.skip_bad_rows else ""
        logger.warning(f"{left_out} of {given} rows {unread}have nothing to learn{within} and were left out.")


def _useful_workers(workers: int | None, rows: int) -> int | None:
    """Starting a process costs about what tokenising 2,000 rows does."""
    return workers if workers and workers > 1 and rows >= 2000 * workers else None
