"""``data.packing``: rows share sequences without loss, overflow or chance."""

import random

import pytest
from datasets import Dataset, IterableDataset

from jebi.data.packing import WINDOW, best_fit, pack


def token_rows(lengths: list[int]) -> Dataset:
    """Rows whose every token says which row it is of."""
    ids = [[number] * length for number, length in enumerate(lengths)]
    return Dataset.from_dict(
        {"input_ids": ids, "labels": ids, "row": [[n] for n in range(len(ids))], "lengths": [[n] for n in lengths]}
    )


def test_the_tutorials_four_rows_fill_two_sequences() -> None:
    groups = best_fit([100, 150, 200, 300], 512)
    assert sorted(map(sorted, groups)) == [[0, 1], [2, 3]]
    packed = pack(token_rows([100, 150, 200, 300]), 512)
    assert sorted(len(ids) for ids in packed["input_ids"]) == [250, 500]


def test_room_is_filled_to_the_last_token() -> None:
    assert best_fit([300, 212, 500, 12], 512) == [[2, 3], [0, 1]]
    assert best_fit([300, 213], 512) == [[0], [1]]


def test_a_packed_sequence_keeps_the_boundaries_of_its_rows() -> None:
    for sequence in pack(token_rows([3, 5, 2, 4]), 8):
        expected = [number for number, length in zip(sequence["row"], sequence["lengths"]) for _ in range(length)]
        assert sequence["input_ids"] == sequence["labels"] == expected
        assert sequence["row"] == sorted(sequence["row"]), "rows of a sequence stay in the data set's order"


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_lost_doubled_or_over_capacity(seed: int) -> None:
    chance = random.Random(seed)
    capacity = chance.choice([1, 7, 64, 512])
    lengths = [chance.randint(1, 2 * capacity if seed % 5 == 0 else capacity) for _ in range(chance.randint(1, 200))]
    groups = best_fit(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[i] for i in group) <= capacity
    assert groups == best_fit(list(lengths), capacity), "the same lengths give the same groups"
    fitting = [length for length in lengths if length <= capacity]
    # Two groups that are both at most half full would have been one.
    assert sum(2 * sum(lengths[i] for i in group) <= capacity for group in groups) <= 1
    assert len(groups) >= len(lengths) - len(fitting) + -(-sum(fitting) // capacity)


def test_short_rows_are_filled_in_beside_long_ones() -> None:
    chance = random.Random(0)
    lengths = [chance.randint(20, 400) for _ in range(WINDOW)]
    groups = best_fit(lengths, 2048)
    assert sum(lengths) / (2048 * len(groups)) > 0.99  # measured 0.998; below it room is being wasted


def test_windows_lose_nothing_either() -> None:
    lengths = [1 + number % 7 for number in range(2 * WINDOW + 1)]
    packed = pack(token_rows(lengths), 16)
    assert sorted(row for rows in packed["row"] for row in rows) == list(range(len(lengths)))
    assert max(len(ids) for ids in packed["input_ids"]) <= 16


def test_no_rows_no_groups() -> None:
    assert best_fit([], 8) == []


def test_a_stream_is_packed_as_the_same_rows_are() -> None:
    lengths = [1 + number % 7 for number in range(WINDOW + 50)]
    rows = token_rows(lengths)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert list(pack(stream, 16)) == list(pack(rows, 16))
