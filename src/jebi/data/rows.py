"""Texts to rows of token ids: tokenised once, cut to length, ready to be laid end to end.

Templates make the texts; passes and packing come after.
"""

import logging
from collections.abc import Callable
from itertools import compress
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

logger = logging.getLogger(__name__)

FormattingFunc = Callable[[dict[str, Any]], str | list[str]]
"""One example, or a batch of columns, to its text or texts."""

Rows: TypeAlias = Dataset | IterableDataset


def tokenize(
    dataset: Rows,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    formatting_func: FormattingFunc | None,
    max_length: int,
    workers: int | None,
) -> Rows:
    """A data set of ``input_ids``, ``labels`` and ``row`` (its number), whatever the input had.

    A data set that has ``input_ids`` already is taken as it is, with its ``labels`` where it has them and without the
    padding that its ``attention_mask`` shows. Rows with nothing to learn are left out.

    Args:
        dataset: the examples.
        tokenizer: adds its special tokens, except a BOS that the text already begins with.
        text_field: column of texts.
        formatting_func: makes the text instead; per example or per batch of columns.
        max_length: longer rows are cut.
        workers: processes that share the work.

    Raises:
        ConfigError: ``max_length`` is below 1.
        DataError: no such column, no rows, or none left with anything to learn.
    """
    if max_length < 1:
        raise ConfigError(f"max_seq_length must be at least 1, not {max_length}; 2048 is usual.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"the rows must be a data set of the datasets package, not {type(dataset).__name__}: "
            "make one with Dataset.from_list(rows)."
        )
    dataset = dataset.with_format(None)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise DataError("the data set is empty.")
    if formatting_func is None and "input_ids" in columns:
        encode = _take_ids(max_length)
    else:
        texts = _texts(dataset, text_field, formatting_func)
        encode = _encode(texts, tokenizer, max_length)
    settings: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": columns}
    if isinstance(dataset, Dataset):
        settings.update(num_proc=_useful_workers(workers, len(dataset)), desc="Tokenizing")
    rows = dataset.map(encode, **settings)
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise DataError(
            f"no row is left: none has anything to learn within max_seq_length={max_length}. Raise max_seq_length."
        )
    if isinstance(dataset, Dataset) and isinstance(rows, Dataset):
        _tell(rows, len(dataset), max_length)
    return rows.remove_columns("cut")


def _texts(
    dataset: Rows, text_field: str, formatting_func: FormattingFunc | None
) -> Callable[[dict[str, list[Any]]], list[str]]:
    """The function from a batch of columns to its texts."""
    first = next(iter(dataset), None)
    if first is None:
        raise DataError("the data set is empty.")
    if formatting_func is None:
        if text_field not in first:
            raise DataError(
                f"dataset_text_field '{text_field}' is no column. There are: {', '.join(first)}. "
                "Name one of them, or pass formatting_func."
            )
        return lambda batch: batch[text_field]
    if _takes_one(formatting_func, first):
        return lambda batch: [formatting_func(example) for example in _examples(batch)]  # type: ignore[misc]
    return lambda batch: formatting_func(batch)  # type: ignore[return-value]


def _takes_one(formatting_func: FormattingFunc, example: dict[str, Any]) -> bool:
    """Whether it makes one text of one example. One written for batches makes something else of it, or fails."""
    try:
        return isinstance(formatting_func(dict(example)), str)
    except Exception:
        # Where it fails on a batch too, the user sees both errors.
        formatting_func({name: [value] for name, value in example.items()})
        return False


def _examples(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def _encode(
    texts_of: Callable[[dict[str, list[Any]]], list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]:
    bos = tokenizer.bos_token

    def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = texts_of(batch)
        if not _are_texts(texts, len(indices)):
            raise DataError("every row must give one text; look at dataset_text_field or formatting_func.")
        has_bos = [bool(bos) and text.startswith(bos) for text in texts]
        plain = (
            tokenizer([t for t, b in zip(texts, has_bos) if not b], add_special_tokens=True)
            if not all(has_bos)
            else None
        )
        begun = tokenizer([t for t, b in zip(texts, has_bos) if b], add_special_tokens=False) if any(has_bos) else None
        ids_plain = iter(plain["input_ids"] if plain is not None else [])
        ids_begun = iter(begun["input_ids"] if begun is not None else [])
        ids = [next(ids_begun) if b else next(ids_plain) for b in has_bos]
        return _columns(ids, ids, indices, max_length)

    return encode


def _are_texts(texts: Any, count: int) -> bool:
    return isinstance(texts, list | tuple) and len(texts) == count and all(isinstance(text, str) for text in texts)


def _take_ids(max_length: int) -> Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]]:
    def take(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        ids = batch["input_ids"]
        labels = batch.get("labels") or ids
        for number, row, learnt in zip(indices, ids, labels):
            if len(row) != len(learnt):
                raise DataError(f"row {number} has {len(row)} input_ids and {len(learnt)} labels; give each token one.")
        if masks := batch.get("attention_mask"):
            ids, labels = ([list(compress(row, mask)) for row, mask in zip(rows, masks)] for rows in (ids, labels))
        return _columns(ids, labels, indices, max_length)

    return take


def _columns(
    ids: list[list[int]], labels: list[list[int]], indices: list[int], max_length: int
) -> dict[str, list[Any]]:
    """Cut to length; rows that teach nothing are left out. No row teaches its first token, which nothing precedes."""
    kept = [n for n, row in enumerate(labels) if any(label != IGNORED for label in row[1:max_length])]
    return {
        "input_ids": [ids[n][:max_length] for n in kept],
        "labels": [labels[n][:max_length] for n in kept],
        "row": [[indices[n]] for n in kept],
        "lengths": [[min(len(ids[n]), max_length)] for n in kept],
        "cut": [len(ids[n]) > max_length for n in kept],
    }


def _tell(rows: Dataset, given: int, max_length: int) -> None:
    """Say how many rows were cut or left out; a cut row has lost its end, EOS included."""
    if cut := sum(rows["cut"]):
        logger.warning(f"{cut} of {given} rows are longer than max_seq_length={max_length} and were cut.")
    if left_out := given - len(rows):
        logger.warning(f"{left_out} of {given} rows have nothing to learn within max_seq_length and were left out.")


def _useful_workers(workers: int | None, rows: int) -> int | None:
    """Starting a process costs about what tokenising 2,000 rows does."""
    return workers if workers and workers > 1 and rows >= 2000 * workers else None
