"""The contract check: token rows, their texts and the tokenizer held against each other before step 0.

What is found is a `Report`; whether it stops a training is for the caller to ask. Millions of tokens take seconds: the
faults are found over flat arrays, never in a loop over tokens.
"""

from collections.abc import Iterable, Iterator
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
from jebi.data.rows import Rows
from jebi.data.text_faults import text_faults
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


@dataclass(frozen=True)
class Contract:
    """What the rows are checked against."""

    longest: int
    """``max_seq_length``; longer rows count as cut."""
    eos: tuple[int, ...] = ()
    """Ids that end an answer beside the tokenizer's EOS, such as the model's generation config has."""
    ready: str | None = "text"
    """The column of ready texts, where control tokens may stand on purpose; None where there is none."""


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
    texts: Rows | None = None,
    heldout: Iterable[Rows] = (),
) -> Report:
    """What is wrong with the rows.

    Args:
        rows: token rows in `data.rows`' columns.
        tokenizer: without one, only what ids alone show is found.
        contract: what they are checked against.
        texts: the raw rows that the token rows were made of, for faults that only texts show.
        heldout: token rows that are not to be trained on.
    """
    control = control_tokens(tokenizer, contract.eos) if tokenizer is not None else None
    seen = _look(rows, tokenizer, control, contract)
    seen.faults["duplicates"] = repeated(seen.hashes)
    examined = len(np.unique(seen.numbers))
    tally = {code: (np.unique(seen.numbers[mask]), examined) for code, mask in seen.faults.items()}
    for code, share in (("rows-cut", CUT_ABOVE), ("template-mismatch", OTHER_FORM_FROM)):
        if code in tally and len(tally[code][0]) < share * examined:
            del tally[code]
    tally["leak"] = _leaked(seen, [_look(part, tokenizer, control, contract) for part in heldout])
    if texts is not None and (table := _table(texts)) is not None:
        tally |= _found_in_texts(table, rows, seen, control, contract)
    findings = [
        Finding(code, len(tally[code][0]), tally[code][1], tuple(tally[code][0][:SHOWN].tolist()))
        for code in CODES
        if code in tally and len(tally[code][0])
    ]
    return Report(tuple(findings), examined, _note(rows))


def _look(
    rows: Rows, tokenizer: PreTrainedTokenizerBase | None, control: ControlTokens | None, contract: Contract
) -> _Seen:
    """Some rows at a time, each time with one more, which says whether it goes on from the one before it."""
    parts = []
    for some, beyond in _portions(rows):
        marked = mark(flat(some).cut(contract.longest), control, tokenizer)
        count = len(marked.rows) - beyond
        faults = {code: mask[:count] for code, mask in _faults(marked, control, contract).items()}
        parts.append(_Seen(faults, marked.rows.numbers[:count], hashes(marked)[:count]))
    return _Seen(
        {code: np.concatenate([part.faults[code] for part in parts]) for code in parts[0].faults},
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.hashes for part in parts]),
    )


def _portions(rows: Rows) -> Iterator[tuple[Dataset | list[dict[str, Any]], int]]:
    """Token rows or packed sequences, and how many rows at their end belong to the next portion."""
    if not isinstance(rows, Dataset):
        yield list(islice(rows, STREAMED)), 0
        return
    last = min(len(rows), MOST)
    for begin in range(0, last, _AT_ONCE):
        end = min(begin + _AT_ONCE, last)
        beyond = len(rows[end].get("lengths", [0])) if end < len(rows) else 0
        yield rows.select(range(begin, end + min(beyond, 1))), beyond


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
    table: pa.Table, rows: Rows, seen: _Seen, control: ControlTokens | None, contract: Contract
) -> dict[str, tuple[Ints, int]]:
    found = text_faults(table, control.names if control else (), contract.ready)
    found["empty-answers"] = np.union1d(found["empty-answers"], seen.numbers[seen.faults["empty-answers"]])
    # Where tokenising left a row out, it had nothing to learn. What lies behind the last row looked at is not known.
    whole = isinstance(rows, Dataset) and len(rows) <= MOST
    known = np.arange(table.num_rows if whole else seen.numbers.max(initial=-1) + 1)
    found["nothing-learnt"] = np.setdiff1d(known, seen.numbers[~seen.faults["nothing-learnt"]])
    return {code: (hit, table.num_rows) for code, hit in found.items()}


def _table(texts: Rows) -> pa.Table | None:
    """The rows that are looked at; None where streamed ones are of too many kinds for columns."""
    if isinstance(texts, Dataset):
        return texts.with_format("arrow")[: min(len(texts), MOST)]
    try:
        return pa.Table.from_pylist(list(islice(texts, STREAMED)))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _note(rows: Rows) -> str | None:
    if isinstance(rows, IterableDataset):
        return f"The rows are streamed: the first {STREAMED:,} were checked."
    return f"The first {MOST:,} of {len(rows):,} rows were checked." if len(rows) > MOST else None
