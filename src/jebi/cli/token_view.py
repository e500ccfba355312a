"""Token rows for the eye: what is learnt, what is not, and what is a control token, with colours and without.

Learnt stretches stand in ⟦ ⟧ and control tokens in ‹ ›, so that a picture without colours says the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from jebi.models.unpadding import IGNORED

BROKEN = "\ufffd"
"""What a tokenizer's decoder writes for bytes that are no whole character."""

_LONGEST_CHARACTER = 4
"""Bytes of a character at most; where as many tokens make none, the text itself is broken."""

HEAD, TAIL = 200, 100
"""Tokens shown of a long row's beginning and end."""

STYLES = {"learnt": "green", "not learnt": "bright_black", "special": "bold magenta"}


@dataclass(frozen=True)
class Piece:
    """The fewest tokens that are whole characters together."""

    text: str
    """Their text."""
    kind: str
    """A key of `STYLES`."""


def legend() -> Text:
    """What colours and marks mean."""
    line = Text()
    line.append("⟦learnt⟧", STYLES["learnt"]).append("  ")
    line.append("not learnt", STYLES["not learnt"]).append("  ")
    line.append("‹control token›", STYLES["special"]).append("  · space  ↵ line  → tab  shades: tokens", "dim")
    return line


def shown_row(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> Text:
    """A row's tokens; the middle of a long one is left out."""
    special = set(tokenizer.all_special_ids) | {t for t, e in tokenizer.added_tokens_decoder.items() if e.special}
    kinds = [_kind(token, label, special) for token, label in zip(ids, labels)]
    kinds[0] = "special" if kinds[0] == "special" else "not learnt"  # nothing precedes it
    learns = [label != IGNORED for label in labels[1:]]
    line = Text()
    if len(ids) <= HEAD + TAIL + 2 * _LONGEST_CHARACTER:
        _append(line, tokenizer, ids, kinds, [False, *learns])
        return line
    head, tail = (_character_begin(tokenizer, ids, place) for place in (HEAD, len(ids) - TAIL))
    learns = [False, *learns]
    _append(line, tokenizer, ids[:head], kinds[:head], learns[:head])
    line.append(f" … {tail - head:,} tokens … ", "dim")
    _append(line, tokenizer, ids[tail:], kinds[tail:], learns[tail:])
    return line


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Iterator[tuple[str, int]]:
    """Texts that are whole characters, and how many tokens each is made of.

    A tokenizer of bytes spells a Korean syllable in up to three tokens, none of which is a character.
    """
    done, waiting = "", 0
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        waiting += 1
        if text.endswith(BROKEN) and waiting < _LONGEST_CHARACTER and count < len(ids):
            continue
        yield text[len(done) :], waiting
        done, waiting = text, 0


def _character_begin(tokenizer: PreTrainedTokenizerBase, ids: list[int], at: int) -> int:
    """The nearest place from ``at`` on that is not within a character's bytes."""
    for begin in range(at, at + _LONGEST_CHARACTER):
        if not str(tokenizer.decode(ids[begin : begin + _LONGEST_CHARACTER])).startswith(BROKEN):
            return begin
    return at


def _append(
    line: Text, tokenizer: PreTrainedTokenizerBase, ids: list[int], kinds: list[str], learns: list[bool]
) -> None:
    """Add the tokens; a stretch is of tokens that are all learnt or all not, control tokens included."""
    at = 0
    parts = []
    for text, count in pieces(tokenizer, ids):
        at += count
        parts.append((Piece(text, kinds[at - 1]), learns[at - 1]))
    shade = False
    for learnt, stretch in groupby(parts, key=lambda part: part[1]):
        line.append("⟦" if learnt else "", STYLES["learnt"])
        for piece, _ in stretch:
            shade = not shade
            line.append(_visible(piece), STYLES[piece.kind] + (" on grey23" if shade else ""))
        line.append("⟧" if learnt else "", STYLES["learnt"])


def _kind(token: int, label: int, special: set[int]) -> str:
    if token in special:
        return "special"
    return "learnt" if label != IGNORED else "not learnt"


def _visible(piece: Piece) -> str:
    if piece.kind == "special":
        return f"‹{piece.text}›"
    return piece.text.replace(" ", "·").replace("\t", "→").replace("\r", "␍").replace("\n", "↵\n").replace(BROKEN, "␦")
