"""Faults that only the raw texts show: wrong encodings, control tokens spelt out, answers of nothing.

Each function answers with the numbers of the rows that have the fault.
"""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jebi.data.flat_rows import Ints
from jebi.data.mojibake import damaged_rows
from jebi.data.texts import Leaf, answers, leaves

LOST = "\ufffd"
"""What decoders write for bytes they cannot read."""


def text_faults(table: pa.Table, names: tuple[str, ...], ready: str | None) -> dict[str, Ints]:
    """Rows by fault.

    Args:
        table: the raw rows.
        names: the tokenizer's control tokens as text.
        ready: the column of ready texts, in which a template may have put control tokens on purpose.
    """
    found: dict[str, list[Ints]] = {"mojibake": [], "lost-characters": [], "special-in-text": []}
    spelt = "|".join(re.escape(name) for name in names)
    for leaf in leaves(table):
        found["mojibake"].append(np.array(damaged_rows(leaf.values, leaf.rows), np.int64))
        found["lost-characters"].append(_holding(leaf, pc.match_substring(leaf.values, LOST)))
        if names and leaf.column != ready:
            found["special-in-text"].append(_holding(leaf, pc.match_substring_regex(leaf.values, spelt)))
    empty = [_holding(leaf, _is_blank(leaf.values)) for leaf in answers(table)]
    return {code: _distinct(rows) for code, rows in (found | {"empty-answers": empty}).items()}


def _is_blank(values: Any) -> Any:
    return pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), "")


def _holding(leaf: Leaf, mask: Any) -> Ints:
    rows: Ints = leaf.rows[pc.fill_null(mask, False).to_numpy(zero_copy_only=False)]
    return rows


def _distinct(rows: list[Ints]) -> Ints:
    return np.unique(np.concatenate([np.empty(0, np.int64), *rows]))
