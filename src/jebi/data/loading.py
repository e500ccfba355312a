"""The sources of a run, each with its rows, on their way to one set of token rows; faults name the source."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation
from jebi.data.formats import read_row, recognise
from jebi.data.formatters import Formatter, apply_formatter
from jebi.data.mixing import Source, mix, mix_streams
from jebi.data.preparation import Preparation, format_of
from jebi.data.rows import Rows, columns_of, tokenize
from jebi.data.sources import load_rows
from jebi.data.streams import stream_rows
from jebi.data.templates import DEFAULTS
from jebi.data.writing import examples
from jebi.errors import ConfigError, DataError

Parts: TypeAlias = list[tuple[Source, Rows]]


def read(sources: list[Source], split: str, streaming: bool = False) -> Parts:
    """The rows of each source; ``split`` is of those hub data sets that name none themselves."""
    load: Any = stream_rows if streaming else load_rows
    return [(source, load(source.name, source.split or split)) for source in sources]


def hold_out(parts: Parts, share: float) -> tuple[Parts, Parts]:
    """A share of each source's rows apart from the rest, drawn the same way every time."""
    rest, apart = [], []
    for source, rows in parts:
        assert isinstance(rows, Dataset), "a stream's rows cannot be counted"
        if len(rows) - math.ceil(len(rows) * share) < 1:
            raise ConfigError(f"data.heldout_share={share} of {len(rows)} rows leaves none to train on.")
        halves = rows.train_test_split(test_size=share, seed=0)
        rest.append((source, halves["train"]))
        apart.append((replace(source, weight=1.0), halves["test"]))
    return rest, apart


def formatted(parts: Parts, formatter: Formatter) -> Parts:
    """The rows as the user's formatter makes them."""
    made = []
    for source, rows in parts:
        with naming(source.name):
            made.append((source, apply_formatter(rows, formatter)))
    return made


def template_of_all(parts: Parts, how: Preparation) -> str | None:
    """What `templates.named` makes the template of all sources of; None where they are ready texts.

    Raises:
        ConfigError: sources of different formats would be written by different templates.
        DataError: a source has no known format.
    """
    found = {}
    for source, rows in parts:
        with naming(source.name):
            form = format_of(columns_of(rows), how)
        found[source.name] = None if form.read is None else how.template or DEFAULTS[form.name]
    if len(set(found.values())) > 1:
        written = ", ".join(f"'{name}' {template or 'ready texts'}" for name, template in found.items())
        raise ConfigError(f"the sources would be written by different templates ({written}): set data.template.")
    return next(iter(found.values()))


def require_readable(parts: Parts, how: Preparation) -> None:
    """Read every row that is not a stream's, so that a fault is told before a model is loaded.

    Raises:
        DataError: a row cannot be read, unless such rows are to be skipped.
    """
    for source, rows in parts:
        with naming(source.name):
            form = format_of(columns_of(rows), how)
            if form.read is None or how.skip_bad_rows or not isinstance(rows, Dataset):
                continue
            number = 0
            for batch in rows.iter(batch_size=1000):
                for row in examples(batch):
                    read_row(form, row, number, how.roles)
                    number += 1


def prepare(parts: Parts, tokenizer: PreTrainedTokenizerBase, how: Preparation, seed: int, buffer: int = 1) -> Rows:
    """The rows of all sources as tokens, mixed by weight; ``row`` counts through the sources.

    Args:
        parts: the sources.
        tokenizer: makes the tokens.
        how: how rows become tokens.
        seed: of drawing and shuffling.
        buffer: rows of a stream among which the next is drawn.
    """
    made: list[Any] = []
    first = 0
    for source, rows in parts:
        with naming(source.name):
            made.append(tokenize(rows, tokenizer, replace(how, first_row=first)))
        first += len(rows) if isinstance(rows, Dataset) else 0
    weights = [source.weight for source, _ in parts]
    if any(isinstance(rows, IterableDataset) for rows in made):
        return mix_streams(made, weights, seed, buffer)
    return mix(made, weights, seed)


def conversations(source: str) -> list[Conversation]:
    """Every row of a source as a conversation.

    Raises:
        DataError: they cannot be read, or are ready texts.
    """
    rows = load_rows(source)
    with naming(source):
        form = recognise(rows.column_names)
        if form.read is None:
            raise DataError("the rows are ready texts, where questions and answers are needed apart.")
        return [read_row(form, row, number, {}) for number, row in enumerate(rows)]


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Faults within name the source."""
    try:
        yield
    except DataError as error:
        raise DataError(f"'{source}': {error}") from error
