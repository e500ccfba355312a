"""Faults that token ids and labels show: what stands at a row's ends, what is learnt, what is there twice.

Each function answers for every row at once. Shapes: T tokens of all rows, R rows.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from jebi.data.control_tokens import ControlTokens, without_blanks
from jebi.data.flat_rows import Bools, FlatRows, Hashes, Ints
from jebi.models.unpadding import IGNORED

MOSTLY = 0.9
"""Share of special or unknown tokens from which a row is of almost nothing else."""

LOOPS_BELOW = 0.2
"""Different runs of `RUN` tokens a token, below which an answer repeats itself, as no prose does."""

RUN = 4

SHORT = 32
"""Learnt tokens below which nothing is called repetitive."""

_BUCKETS = 512
"""Runs are counted in as many buckets, and as many of a row's learnt tokens are looked at: natural text fills 63 %."""


@dataclass(frozen=True)
class Marked:
    """Rows with what the faults are about found once."""

    rows: FlatRows
    blank: Bools
    """(T,) tokens of white space alone."""
    same: Ints
    """(T,) ids in which tokens that differ in white space alone are one."""
    special: Bools
    """(T,) control tokens and the unknown one."""
    end: Bools
    """(T,) tokens that may end an answer."""
    last: Ints
    """(R,) place of the last token that is no white space, or -1."""

    @property
    def ended(self) -> Bools:
        """(R,) rows that end with an EOS."""
        return (self.last >= 0) & self.end[self.last]


def mark(rows: FlatRows, control: ControlTokens | None, tokenizer: PreTrainedTokenizerBase | None) -> Marked:
    """Find in the rows what the tokenizer says of their tokens; without one, nothing is special."""
    ids = rows.ids
    blank, same = np.zeros(len(ids), bool), ids
    if tokenizer is not None and len(ids):
        table = without_blanks(tokenizer, np.unique(ids).tolist())
        by_id = np.full(int(ids.max()) + 1, -1, np.int64)
        for token, first in table.items():
            by_id[token] = -1 if first is None else first
        same = by_id[ids]
        blank = same < 0
    special = np.isin(ids, control.specials if control else ())
    end = np.isin(ids, control.ends if control else ())
    return Marked(rows, blank, same, special, end, rows.last(~blank))


def bos_faults(marked: Marked, control: ControlTokens) -> dict[str, Bools]:
    """BOS twice, or not where the tokenizer or the template puts it."""
    rows, ids = marked.rows, marked.rows.ids
    begins, twice = _at(rows, 0, ids == control.bos), _at(rows, 1, ids == control.bos)
    expected = np.full(len(rows), control.adds_bos)
    if control.template_adds_bos:
        expected |= opened(rows, control.opening)
    return {"doubled-bos": begins & twice, "missing-bos": expected & ~begins}


def eos_faults(marked: Marked, control: ControlTokens, longest: int) -> dict[str, Bools]:
    """EOS missing or masked. Rows as long as may be and without EOS were cut, which is no fault of their texts."""
    rows = marked.rows
    learnt = rows.labels != IGNORED
    after_learnt = np.concatenate(([False], learnt[:-1]))[: len(learnt)]
    after_learnt[rows.starts[:-1][rows.lengths > 0]] = False
    masked = rows.counts(marked.end & ~learnt & after_learnt) > 0
    by_padding = control.pad is not None and control.pad in control.ends
    return {
        "missing-eos": ~marked.ended,
        "pad-is-eos" if by_padding else "masked-eos": masked,
        "rows-cut": ~marked.ended & (rows.lengths >= longest),
    }


def empty_answers(marked: Marked) -> Bools:
    """Rows with a prompt apart, of which nothing is learnt but control tokens and white space."""
    rows = marked.rows
    prompted = rows.counts(~rows.learnt) > 1
    answer = rows.counts(rows.learnt & ~marked.special & ~marked.blank)
    empty: Bools = prompted & (answer == 0) & (rows.counts(rows.learnt) > 0)
    return empty


def mostly_special(marked: Marked) -> Bools:
    """Rows of hardly any text; those of a BOS and an EOS alone are."""
    mostly: Bools = marked.rows.counts(marked.special) > MOSTLY * marked.rows.lengths
    return mostly


def repetitive(rows: FlatRows) -> Bools:
    """Rows whose learnt tokens are the same runs again and again.

    Different runs are counted as filled buckets of a row, which needs no sorting; what collides is forgiven by
    `LOOPS_BELOW` being far from what prose has.
    """
    learnt, row_T = rows.learnt, rows.row_of()
    before = np.concatenate(([0], np.cumsum(learnt)))
    early = before[:-1] - np.repeat(before[rows.starts[:-1]], rows.lengths) < _BUCKETS
    place = np.flatnonzero(learnt & early)
    place = place[place + RUN <= len(rows.ids)]
    place = place[row_T[place] == row_T[place + RUN - 1]]
    runs = np.zeros(len(place), np.uint64)
    for ahead in range(RUN):
        runs = (runs ^ rows.ids[place + ahead].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    filled = np.zeros((len(rows), _BUCKETS), bool)
    filled[row_T[place], (runs >> np.uint64(55)).astype(np.int64)] = True
    seen = np.bincount(row_T[place], minlength=len(rows))
    loops: Bools = (seen >= SHORT) & (filled.sum(axis=1) < LOOPS_BELOW * seen)
    return loops


def opened(rows: FlatRows, opening: tuple[int, ...]) -> Bools:
    """(R,) rows that hold the chat template's beginning of an answer."""
    found = np.zeros(len(rows.ids), bool)
    width = len(opening)
    if not width or len(rows.ids) < width:
        return np.zeros(len(rows), bool)
    count = len(rows.ids) - width + 1
    here = np.ones(count, bool)
    for ahead, token in enumerate(opening):
        here &= rows.ids[ahead : ahead + count] == token
    found[:count] = here
    holding: Bools = rows.counts(found) > 0
    return holding


def hashes(marked: Marked) -> Hashes:
    """(R,) equal for rows that are equal but for white space."""
    return marked.rows.hashes(marked.same, ~marked.blank)


def repeated(hashes_R: Hashes, numbers_R: Ints) -> Bools:
    """(R,) rows that are there earlier already under another number; a row that is drawn twice is none."""
    _, first, same = np.unique(hashes_R, return_index=True, return_inverse=True)
    again: Bools = numbers_R[first][same] != numbers_R
    return again


def _at(rows: FlatRows, place: int, mask_T: Bools) -> Bools:
    """(R,) the mask at a place of each row; False where the row is shorter."""
    found = np.zeros(len(rows), bool)
    long = rows.lengths > place
    found[long] = mask_T[rows.starts[:-1][long] + place]
    return found
