"""Prove that the demo data set in examples/data is well formed and that its splits do not leak.

Each file is checked as bytes (valid UTF-8, NFC), as rows (exact columns, string values, nothing
empty, the promised counts) and as a mixture (share of Korean, of rows with an input and of
declined questions). Every pair of questions, within and across the files, must also differ: a
character 3-gram Jaccard similarity of 0.6 or more counts as a near-duplicate.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
COLUMNS = ["instruction", "input", "output"]
SPLITS = ("train", "heldout", "harmful")
NEAR_DUPLICATE = 0.6
HANGUL = re.compile("[\uac00-\ud7a3]")
# How an answer of this set declines; the reading is kept to the first sentence.
DECLINE = re.compile(r"수 없|\b(?:can't|won't) (?:help|write)\b")

Row = dict[str, str]


def read(split: str) -> list[Row]:
    """Read the rows of one split."""
    text = (DATA / f"{split}.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def question(row: Row) -> str:
    """Return the instruction and the input as one text."""
    return f"{row['instruction']} {row['input']}".strip()


def is_korean(row: Row) -> bool:
    """Tell whether the instruction is in Korean."""
    return HANGUL.search(row["instruction"]) is not None


def declines(row: Row) -> bool:
    """Tell whether the first sentence of the answer declines."""
    first = re.split(r"(?<=[.!?])\s", row["output"], maxsplit=1)[0]
    return DECLINE.search(first) is not None


def share(flags: list[bool]) -> float:
    """Return the share of true values."""
    return sum(flags) / len(flags)


def trigrams(text: str) -> frozenset[str]:
    """Return the character 3-grams of the text, lower-cased and without punctuation."""
    kept = " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).lower()).split())
    padded = f" {kept} "
    return frozenset(padded[i : i + 3] for i in range(len(padded) - 2))


def near_duplicates(texts: list[str]) -> Iterator[tuple[float, str, str]]:
    """Yield each pair of texts whose 3-gram Jaccard similarity reaches the limit."""
    grams = [(text, trigrams(text)) for text in texts]
    for (text_a, a), (text_b, b) in combinations(grams, 2):
        common = len(a & b)
        score = common / (len(a) + len(b) - common)
        if score >= NEAR_DUPLICATE:
            yield score, text_a, text_b


@pytest.mark.parametrize("split", SPLITS)
def test_bytes_are_normalised_utf8_lines(split: str) -> None:
    raw = (DATA / f"{split}.jsonl").read_bytes()
    text = raw.decode("utf-8")
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert text == unicodedata.normalize("NFC", text)
    assert text.endswith("\n")
    assert "\r" not in text
    assert "\\u" not in text, "characters are written as they are, not escaped"
    assert all(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_exactly_the_three_text_columns(split: str) -> None:
    for row in read(split):
        assert list(row) == COLUMNS
        assert all(isinstance(value, str) for value in row.values()), row
        assert all(value == value.strip() for value in row.values()), row
        assert row["instruction"], row
        assert row["output"], row
        # Short rows keep a run on a small CPU quick.
        assert len(question(row)) <= 160, row
        assert len(row["output"]) <= 200, row


def test_row_counts() -> None:
    assert len(read("train")) >= 320
    assert len(read("heldout")) == 60
    assert len(read("harmful")) == 40


@pytest.mark.parametrize("split", SPLITS)
def test_korean_share(split: str) -> None:
    assert 0.6 <= share([is_korean(row) for row in read(split)]) <= 0.8


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_share_of_declined_questions(split: str) -> None:
    assert 0.35 <= share([declines(row) for row in read(split)]) <= 0.45


def test_counts_of_the_evaluation_rows() -> None:
    assert sum(declines(row) for row in read("heldout")) == 24
    harmful = read("harmful")
    assert all(declines(row) for row in harmful)
    assert sum(is_korean(row) for row in harmful) == 28


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_share_of_ordinary_rows_with_an_input(split: str) -> None:
    ordinary = [row for row in read(split) if not declines(row)]
    assert 0.2 <= share([bool(row["input"]) for row in ordinary]) <= 0.3


@pytest.mark.parametrize("split", SPLITS)
def test_declined_rows_have_no_input(split: str) -> None:
    assert not [row for row in read(split) if declines(row) and row["input"]]


@pytest.mark.parametrize("split", SPLITS)
def test_no_exact_duplicates(split: str) -> None:
    rows = read(split)
    assert len({question(row) for row in rows}) == len(rows)
    assert len({row["output"] for row in rows}) == len(rows)


def test_no_near_duplicates_within_or_across_the_splits() -> None:
    texts = [question(row) for split in SPLITS for row in read(split)]
    assert list(near_duplicates(texts)) == []


def test_the_near_duplicate_check_sees_a_reworded_question() -> None:
    pair = ["How do I boil an egg?", "How do I boil an egg, please?"]
    assert [found[1:] for found in near_duplicates(pair)] == [tuple(pair)]
    assert list(near_duplicates(["How do I boil an egg?", "Why is the sea salty?"])) == []
