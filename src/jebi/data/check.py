"""The contract check: token rows, their texts and the tokenizer held against each other before step 0.

What is found is a `Report`; whether it stops a training is for the caller to ask. Millions of tokens take seconds: the
faults are found over flat arrays, never in a loop over tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from jebi.data.control_tokens import ControlTokens, control_tokens
from jebi.data.findings import CODES, SHOWN, Finding, Report
from jebi.data.flat_rows import Bools, Hashes, Ints, flat
from jebi.data.known_tokens import require_known_tokens
from jebi.data.rows import Rows
from jebi.data.text_faults import text_faults
from jebi.data.texts import as_table
from jebi.data.token_faults import (
    Marked,
    bos_faults,
    empty_answers,
    eos_faults,
    hashes,
    mark,
    mostly_special,
    opened,
    repeated,
    repetitive,
)
from jebi.errors import DataError

STREAMED = 1_000
"""Rows of a stream that are looked at: the first ones, since reading on may take hours."""

MOST = 200_000
"""Rows of a data set that are looked at, so that a check stays a matter of seconds."""

_AT_ONCE = 5_000
"""Rows whose tokens are in memory together."""

CUT_ABOVE = 0.05
"""Share of rows cut by ``max_seq_length`` that is worth a finding."""

OTHER_FORM_FROM = 0.5
"""Share of rows in another form than the chat template's that is; single rows may have been cut before their answer."""

_OF_WHOLE_ROWS = ("missing-bos", "missing-eos", "rows-cut", "empty-answers", "nothing-learnt", "template-mismatch")
"""Faults that a row split into pieces has only where every piece has them."""


@dataclass(frozen=True)
class Contract:
    """What the rows are checked against."""

    longest: int
    """``max_seq_length``; longer rows count as cut."""
    eos: tuple[int, ...] = ()
    """Ids that end an answer beside the tokenizer's EOS, such as the model's generation config has."""
    ready: str | None = "text"
    """The column of ready texts, where control tokens may stand on purpose; None where there is none."""
    vocabulary: int | None = None
    """Tokens that the model has; None where that is not known."""
    all_drawn: bool = True
    """Whether every raw row is to be among the token rows; of a source that is weighed below 1 some are not."""


@dataclass(frozen=True)
class _Seen:
    """What the tokens of R rows show."""

    faults: dict[str, Bools]
    """(R,) by code."""
    numbers: Ints
    """(R,) the rows' numbers."""
    hashes: Hashes
    """(R,) equal for rows that are equal but for white space."""


def check_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase | None,
    contract: Contract,
    texts: Sequence[Rows] = (),
    heldout: Iterable[Rows] = (),
) -> Report:
    """What is wrong with the rows.

    Args:
        rows: token rows in `data.rows`' columns.
        tokenizer: without one, only what ids alone show is found.
        contract: what they are checked against.
        texts: the raw rows that the token rows were made of, in the order of their numbers, for faults that only texts
            show.
        heldout: token rows that are not to be trained on.

    Raises:
        DataError: there is nothing to learn, or a token that the model does not have.
    """
    control = control_tokens(tokenizer, contract.eos) if tokenizer is not None else None
    seen = _look(rows, tokenizer, control, contract)
    seen.faults["duplicates"] = repeated(seen.hashes, seen.numbers)
    examined = len(np.unique(seen.numbers))
    tally = {code: (_having(code, mask, seen.numbers), examined) for code, mask in seen.faults.items()}
    if "missing-eos" in tally:
        tally["missing-eos"] = np.setdiff1d(tally["missing-eos"][0], tally["rows-cut"][0]), examined
    for code, share in (("rows-cut", CUT_ABOVE), ("template-mismatch", OTHER_FORM_FROM)):
        if code in tally and len(tally[code][0]) < share * examined:
            del tally[code]
    tally["leak"] = _leaked(seen, [_look(part, tokenizer, control, contract) for part in heldout])
    if texts:
        tally |= _found_in_texts(texts, rows, seen, control, contract)
    findings = [
        Finding(code, len(tally[code][0]), tally[code][1], tuple(tally[code][0][:SHOWN].tolist()))
        for code in CODES
        if code in tally and len(tally[code][0])
    ]
    return Report(tuple(findings), examined, _note(rows))


def _having(code: str, mask_R: Bools, numbers_R: Ints) -> Ints:
    """Numbers of the rows with a fault."""
    numbers = np.unique(numbers_R[mask_R])
    return np.setdiff1d(numbers, numbers_R[~mask_R]) if code in _OF_WHOLE_ROWS else numbers


def _look(
    rows: Rows, tokenizer: PreTrainedTokenizerBase | None, control: ControlTokens | None, contract: Contract
) -> _Seen:
    parts = []
    for some in _portions(rows):
        part = flat(some).cut(contract.longest)
        if contract.vocabulary is not None:
            require_known_tokens(part, contract.vocabulary, tokenizer)
        marked = mark(part, control, tokenizer)
        parts.append(_Seen(_faults(marked, control, contract), marked.rows.numbers, hashes(marked)))
    if not any(len(part.numbers) for part in parts):
        raise DataError("none of the rows that were looked at has anything to learn: look at weights and data.learn.")
    return _Seen(
        {code: np.concatenate([part.faults[code] for part in parts]) for code in parts[0].faults},
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.hashes for part in parts]),
    )


def first_rows(rows: Rows) -> Dataset | list[dict[str, Any]]:
    """All rows of a data set, and of a stream those that are looked at."""
    return rows if isinstance(rows, Dataset) else list(islice(rows, STREAMED))


def _portions(rows: Rows) -> Iterator[Dataset | list[dict[str, Any]]]:
    if not isinstance(rows, Dataset):
        yield first_rows(rows)
        return
    last = min(len(rows), MOST)
    for begin in range(0, last, _AT_ONCE):
        yield rows.select(range(begin, min(begin + _AT_ONCE, last)))


def _faults(marked: Marked, control: ControlTokens | None, contract: Contract) -> dict[str, Bools]:
    """What each row shows by itself."""
    rows = marked.rows
    found = {
        "nothing-learnt": rows.counts(rows.learnt) == 0,
        "empty-answers": empty_answers(marked),
        "repetitive": repetitive(rows),
    }
    if control is None:
        return found
    found |= bos_faults(marked, control) if control.bos is not None else {}
    found |= eos_faults(marked, control, contract.longest) if control.ends else {}
    found["mostly-special"] = mostly_special(marked)
    if control.opening:
        found["template-mismatch"] = ~opened(rows, control.opening)
    return found


def _leaked(seen: _Seen, heldout: list[_Seen]) -> tuple[Ints, int]:
    """Numbers of held-out rows that are training rows too, and how many rows are held out."""
    hit = [part.numbers[np.isin(part.hashes, seen.hashes)] for part in heldout]
    return np.concatenate([np.empty(0, np.int64), *hit]), sum(len(part.numbers) for part in heldout)


def _found_in_texts(
    texts: Sequence[Rows], rows: Rows, seen: _Seen, control: ControlTokens | None, contract: Contract
) -> dict[str, tuple[Ints, int]]:
    """What the raw rows show, numbered through the sources as the token rows are; and which of them were left out."""
    found: dict[str, Ints] = {"empty-answers": _having("empty-answers", seen.faults["empty-answers"], seen.numbers)}
    first = given = 0
    for source in texts:
        table = _table(source)
        for code, hit in text_faults(table, control.names if control else (), contract.ready).items():
            found[code] = np.union1d(found.get(code, np.empty(0, np.int64)), hit + first)
        given += table.num_rows
        first += len(source) if isinstance(source, Dataset) else 0
    if contract.all_drawn and isinstance(rows, Dataset) and len(rows) <= MOST and first == given:
        left_out = np.setdiff1d(np.arange(given), seen.numbers[~seen.faults["nothing-learnt"]])
        found["nothing-learnt"] = left_out
    return {code: (hit, max(given, 1)) for code, hit in found.items()}


def _table(texts: Rows) -> pa.Table:
    """The rows that are looked at."""
    if isinstance(texts, Dataset):
        return texts.with_format("arrow")[: min(len(texts), MOST)]
    return as_table(list(islice(texts, STREAMED)))


def _note(rows: Rows) -> str | None:
    if isinstance(rows, IterableDataset):
        return f"The rows are streamed: the first {STREAMED:,} were checked."
    return f"The first {MOST:,} of {len(rows):,} rows were checked." if len(rows) > MOST else None
