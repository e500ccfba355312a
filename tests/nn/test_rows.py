"""``nn.rows``: boundaries, positions, rows recovered from positions, and beginnings that rows share."""

import pytest
import torch

from jebi.nn.rows import Rows, rows_from_lengths, rows_from_positions

CPU = torch.device("cpu")


def test_rows_of_lengths() -> None:
    rows = rows_from_lengths([3, 1, 2], CPU)
    assert rows.starts == (0, 3, 4, 6)
    assert rows.positions_U.tolist() == [0, 1, 2, 0, 0, 1]
    assert rows.spans() == [(0, 3), (3, 4), (4, 6)]
    assert rows.longest == 3
    assert rows.cu_seqlens().tolist() == [0, 3, 4, 6]
    assert rows.cu_seqlens().dtype == torch.int32


def test_no_rows() -> None:
    rows = rows_from_lengths([], CPU)
    assert (rows.starts, rows.longest, rows.spans()) == ((0,), 0, [])
    assert rows.positions_U.shape == (0,)


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([0, 1, 2], (0, 3)),
        ([0], (0, 1)),
        ([0, 1, 2, 0, 1], (0, 3, 5)),
        ([0, 0, 0], (0, 1, 2, 3)),  # rows of one token
        ([0, 0, 1, 0], (0, 1, 3, 4)),
        ([5, 6, 7], (0, 3)),  # a row that goes on from elsewhere
        ([5, 6, 0, 1], (0, 2, 4)),
        ([0, 1, 5, 6], (0, 2, 4)),  # a gap
        ([2, 1, 0], (0, 1, 2, 3)),
        ([1, 2, 3], (0, 3)),  # a first row that begins at 1
    ],
)
def test_rows_of_positions(positions: list[int], starts: tuple[int, ...]) -> None:
    rows = rows_from_positions(torch.tensor(positions))
    assert rows.starts == starts
    assert rows.positions_U.tolist() == positions


def test_lengths_and_positions_agree() -> None:
    rows = rows_from_lengths([4, 1, 1, 9], CPU)
    assert rows_from_positions(rows.positions_U).starts == rows.starts


def test_moving_keeps_the_starts() -> None:
    rows = rows_from_lengths([3, 2], CPU)
    moved = rows.to(torch.device("meta"))
    assert moved.starts == rows.starts
    assert moved.positions_U.is_meta


def test_common_beginnings() -> None:
    whole, first = torch.tensor([0, 1, 2, 0, 1, 3]), torch.tensor([0, 1, 2, 5])
    rows = Rows((0, 3, 6), torch.tensor([0, 1, 2, 2]), whole, first)
    values = torch.tensor([[10.0], [11.0], [12.0], [13.0]])
    assert rows.spread(values).flatten().tolist() == [10, 11, 12, 10, 11, 13]
    assert torch.equal(rows.gather(rows.spread(values)), values)
    moved = rows.to(torch.device("meta"))
    assert moved.whole_T.is_meta
    assert moved.first_U.is_meta
    plain = rows_from_lengths([3, 1], CPU)
    assert plain.spread(values) is values
    assert plain.gather(values) is values
