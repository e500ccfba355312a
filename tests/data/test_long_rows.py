"""``data.long_rows``: every token of a split row is learnt once, and a refused row is named."""

import random

import pytest
from datasets import Dataset, IterableDataset

from jebi.data.long_rows import fit, require_choice
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED


def rows_of(*sizes: int) -> Dataset:
    """Rows that count their tokens; the first three are not learnt."""
    return Dataset.from_list(
        [
            {
                "input_ids": list(range(size)),
                "labels": [IGNORED] * 3 + list(range(3, size)),
                "row": [number],
                "lengths": [size],
                "weights": [0.5],
            }
            for number, size in enumerate(sizes)
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_learnt_once_whatever_the_overlap(seed: int) -> None:
    chance = random.Random(seed)
    longest, size = chance.randint(5, 40), chance.randint(5, 300)
    overlap = chance.randint(0, longest - 1) if seed else 0
    pieces = fit(rows_of(size), longest, "split", overlap)
    learnt = [label for piece in pieces for label in piece["labels"][1:] if label != IGNORED]
    assert learnt == list(range(3, size))
    for piece in pieces:
        first = piece["input_ids"][0]
        assert piece["input_ids"] == list(range(first, first + len(piece["labels"])))
        assert piece["lengths"] == [len(piece["input_ids"])]
        assert piece["lengths"][0] <= longest
        assert (piece["row"], piece["weights"]) == ([0], [0.5])
    assert pieces[-1]["input_ids"][-1] == size - 1


def test_without_overlap_pieces_share_a_token_so_that_all_are_learnt() -> None:
    pieces = fit(rows_of(10, 4), 4, "split", 0)
    assert pieces["input_ids"][:] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [0, 1, 2, 3]]
    assert pieces["row"][:] == [[0], [0], [0], [1]]


def test_a_piece_that_teaches_nothing_is_left_out() -> None:
    assert fit(rows_of(6), 3, "split", 0)["input_ids"][:] == [[2, 3, 4], [4, 5]]


def test_a_stream_is_split_as_it_comes() -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows_of(10, 4)))
    assert list(fit(stream, 4, "split", 1)) == list(fit(rows_of(10, 4), 4, "split", 1))


def test_a_long_row_is_refused_by_its_number() -> None:
    assert list(fit(rows_of(4, 4), 4, "refuse", 0)) == list(rows_of(4, 4))
    with pytest.raises(DataError, match=r"row 1 has 5 tokens, and long rows are refused \(data.long\)"):
        fit(rows_of(4, 5), 4, "refuse", 0)


@pytest.mark.parametrize(
    ("long", "overlap", "said"),
    [
        ("trim", 0, "long must be one of cut, split, refuse, not 'trim'"),
        ("cut", 2, "overlap=2 does nothing with long='cut'"),
        ("split", 8, "overlap=8 must be from 0 to below max_seq_length=8"),
        ("split", -1, "overlap=-1 must be from 0"),
    ],
)
def test_settings_that_contradict_each_other(long: str, overlap: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_choice(long, overlap, 8)
