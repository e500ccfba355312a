"""``data.dealing``: every row goes to one process, the same whoever deals, and none has much more than another."""

import random

import pytest
import torch

from jebi.data.dealing import Ranks, deal, digest, passes_of
from jebi.data.passes import Batch, collate, cut


def batches(lengths: list[list[int]], weighed: bool = False) -> list[Batch]:
    made, number = [], 0
    for part in lengths:
        rows = []
        for length in part:
            ids = torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(number)).tolist()
            row = {"input_ids": ids, "labels": ids, "row": [number], "lengths": [length]}
            rows.append(row | ({"weights": [0.5] * length} if weighed else {}))
            number += 1
        made.append(collate(rows))
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_every_row_is_dealt_once_and_evenly(ranks: int) -> None:
    chance = random.Random(ranks)
    lengths = [chance.randint(20, 2048) for _ in range(8 * ranks)]
    shares = deal(lengths, ranks)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    tokens = [sum(lengths[row] for row in share) for share in shares]
    # Eight rows a process, of uniformly drawn lengths: the last ones that are dealt are short.
    assert max(tokens) <= 1.04 * sum(tokens) / ranks


def test_fewer_rows_than_processes() -> None:
    assert deal([7, 9], 4) == [[1], [0], [], []]


@pytest.mark.parametrize("weighed", [False, True])
def test_the_shares_passes_are_the_step_s_rows(weighed: bool) -> None:
    step = batches([[30, 5, 12], [40], [9, 9]], weighed)
    shares = [passes_of(step, 32, True, Ranks(rank, 3)) for rank in range(3)]

    def rows_of(passes: list) -> list[tuple[list[int], list[int], list[float]]]:
        columns = ("input_ids", "shift_labels", "counts")
        return sorted(
            tuple(getattr(part, name)[0, start:end].tolist() for name in columns)  # type: ignore[misc]
            for part in passes
            for start, end in part.rows.spans()
        )

    assert rows_of([part for share in shares for part in share]) == rows_of(cut(step, 32, share=True))


def test_in_step_all_have_as_many_passes_and_the_added_ones_teach_nothing() -> None:
    step = batches([[60], [8, 8], [8]])
    shares = [passes_of(step, 8, True, Ranks(rank, 2, in_step=True)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    (alone,) = passes_of(step, 8, True, Ranks(0, 2))
    assert torch.equal(shares[0][0].input_ids, alone.input_ids)
    assert all(part.counts.sum() == 0 for part in shares[0][1:])


def test_a_digest_tells_rows_apart() -> None:
    assert digest(batches([[5, 6]])) == digest(batches([[5, 6]]))
    assert len({digest(batches(lengths)) for lengths in ([[5, 6]], [[6, 5]], [[11]])}) == 3
    assert 0 <= digest(batches([[5]])) < 2**62
