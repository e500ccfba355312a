"""Mojibake: text in UTF-8 or CP949 that was read as another encoding, found exactly and turned back.

Three readings leave text that can be turned back: UTF-8 as Latin-1 or Windows-1252 (``é`` as ``Ã©``), EUC-KR as either
(``안녕`` as ``¾È³ç``), and, rarely, UTF-8 as CP949 (``고래`` as ``怨좊옒``). Only what turns into valid text counts.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from jebi.data.rows import Rows
from jebi.data.texts import TALK, leaves

_BYTES = {bytes([code]).decode("cp1252"): code for code in range(0x80, 0xA0) if code not in b"\x81\x8d\x8f\x90\x9d"}
"""Windows-1252's characters of 0x80 to 0x9f; all others are Latin-1's, at their own code point."""

_INNER = "\u0080-\u00bf" + "".join(_BYTES)
_UTF8 = f"[\u00c3-\u00df][{_INNER}]|\u00c2[\u00a0-\u00bf]|[\u00e0-\u00ef][{_INNER}]{{2}}|[\u00f0-\u00f4][{_INNER}]{{3}}"
_EUC_KR = "[\u00a1-\u00fe]{4,}"
_HANJA = "[\u4e00-\u9fff\uf900-\ufaff]"
_CJK_MARKS = "[\u2000-\u206f\u3000-\u303f\uff00-\uffef]"

CANDIDATES = f"{_UTF8}|{_EUC_KR}|{_HANJA}"
"""A pattern (RE2's and Python's) for texts that are worth a closer look."""

_SURE_LEADS = "\u00c2\u00c3\u00e2"
"""First characters of the mojibake of é, of a no-break space, and of quotes and dashes."""

_READINGS = 3
"""How often a text may have gone through the wrong reading."""


def repaired(text: str) -> str:
    """The text as it was meant; the same text where nothing is wrong with it."""
    fixed = re.sub(f"(?<![\u0080-\u00ff]){_EUC_KR}(?![\u0080-\u00ff])", _from_euc_kr, text)
    for _ in range(_READINGS):
        fixed = _as_latin(fixed)
    return fixed if fixed != text else _as_cp949(text)


def repair(rows: Rows) -> tuple[Rows, int]:
    """Turn back every text of the rows, however deep it stands, and say how many rows had any.

    A stream's are turned back as they come, and not counted.
    """
    if not isinstance(rows, Dataset):
        return rows.map(_repaired), 0
    damaged = {row for leaf in leaves(rows.with_format("arrow")[:]) for row in damaged_rows(leaf.values, leaf.rows)}
    if not damaged:
        return rows, 0
    fixed = rows.map(
        lambda row, number: _repaired(row) if number in damaged else row,
        with_indices=True,
        features=rows.features,  # guessed anew, objects would gain each other's members
        desc="Repairing",
    )
    return fixed, len(damaged)


def damaged_rows(values: Any, rows: Any) -> list[int]:
    """Row numbers of the texts in an arrow array that `repaired` would change."""
    looked_at = np.flatnonzero(pc.match_substring_regex(values, CANDIDATES).to_numpy(zero_copy_only=False) == True)  # noqa: E712  (null is neither)
    return [int(rows[place]) for place in looked_at if repaired(text := values[int(place)].as_py()) != text]


def _as_latin(text: str) -> str:
    """Sequences that are UTF-8 byte by byte; one alone may be chance, unless it is of the well-known kind."""
    found = [match for match in re.finditer(_UTF8, text) if _from_utf8(match.group()) is not None]
    if len(found) == 1 and len(found[0].group()) < 4:
        character = _from_utf8(found[0].group()) or ""
        if found[0].group()[0] not in _SURE_LEADS and not _is_hangul(character):
            return text
    return re.sub(_UTF8, lambda match: _from_utf8(match.group()) or match.group(), text)


def _from_utf8(sequence: str) -> str | None:
    try:
        character = bytes(_BYTES.get(letter, ord(letter)) for letter in sequence).decode("utf-8")
    except (UnicodeDecodeError, ValueError):
        return None
    return character if character >= "\u00a0" else None


def _from_euc_kr(match: re.Match[str]) -> str:
    """Hangul where the bytes are nothing else; four different ones at least, since ···· are bytes of Hangul too."""
    run = match.group()
    if re.fullmatch(f"(?:{_UTF8})+", run):
        return run
    try:
        meant = run.encode("latin-1").decode("euc_kr")
    except UnicodeDecodeError:
        return run
    words = re.sub(_CJK_MARKS, "", meant)
    return meant if words and _is_hangul(words) and len(set(run)) >= 4 else run


def _as_cp949(text: str) -> str:
    if not re.search(_HANJA, text):
        return text
    try:
        meant = text.encode("cp949").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return text
    return meant


def _is_hangul(text: str) -> bool:
    return all("가" <= character <= "힣" for character in text)


def _repaired(row: dict[str, Any]) -> dict[str, Any]:
    """A row with every text turned back, within the JSON of a conversation too, which may escape it."""
    made: dict[str, Any] = _deep(dict(row), repaired)
    for column in TALK:
        if isinstance(made.get(column), str):
            try:
                made[column] = json.dumps(_deep(json.loads(made[column]), repaired), ensure_ascii=False)
            except json.JSONDecodeError:  # a text
                continue
    return made


def _deep(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _deep(part, change) for name, part in value.items()}
    return [_deep(part, change) for part in value] if isinstance(value, list) else value
