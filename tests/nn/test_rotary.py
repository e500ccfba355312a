"""``nn.rotary``: every row turns by its own length, whatever lies beside it."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jebi.kernels.rope import rope_tables
from jebi.nn.rotary import Rotary
from jebi.nn.rows import Rows, rows_from_lengths

CPU = torch.device("cpu")
INV_FREQ = torch.tensor([1.0, 0.1, 0.01])


def by_length() -> Rotary:
    """Up to 4 tokens one set of frequencies, beyond it one for every length."""
    return Rotary(INV_FREQ.clone(), 1.5, 4, lambda length: INV_FREQ / length)


def expected(positions: Tensor, inv_freq: Tensor) -> Tensor:
    return torch.stack(rope_tables(positions, inv_freq, 1.5, torch.float32))


def test_one_set_of_frequencies_holds_for_any_length() -> None:
    rotary = Rotary(INV_FREQ, 1.5)
    assert rotary.holds(10**9)
    rows = rows_from_lengths([3, 900], CPU)
    assert torch.equal(torch.stack(rotary.of_rows(rows, torch.float32)), expected(rows.positions_U, INV_FREQ))
    positions = torch.tensor([[0, 1], [7, 5000]])
    assert torch.equal(torch.stack(rotary.of_positions(positions, torch.float32)), expected(positions, INV_FREQ))


def test_a_steps_tables_are_looked_up() -> None:
    """In tables that stay where they are, since graphs read them, and of which a copy of the model has none."""
    rotary, places = Rotary(INV_FREQ, 1.5), []
    cases = ([0, 255], 200), ([255, 256, 3], 257), ([511], 512), ([7], 1), ([300], 400)
    for dtype in (torch.float32, torch.bfloat16):
        for positions, reach in cases:
            positions_B = torch.tensor(positions)
            for got, whole in zip(rotary.of_step(positions_B, reach, dtype), rotary.of_positions(positions_B, dtype)):
                assert torch.equal(got, whole)
            places.append([table.data_ptr() for tables in rotary._known.values() for table in tables])
    assert len(rotary._known) == 4, "256 and 512 positions, in two dtypes"
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(places))
    copy = deepcopy(rotary)
    assert not copy._known
    assert torch.equal(copy.of_step(positions_B, 400, dtype)[0], rotary.of_step(positions_B, 400, dtype)[0])
    rotary.forget()
    assert not rotary._known


def test_a_steps_tables_of_each_row_go_by_its_own_length() -> None:
    positions_B = torch.tensor([3, 4, 8])
    tables = torch.stack(by_length().of_step(positions_B, 256, torch.float32))
    inv_freq_B3 = torch.stack((INV_FREQ, INV_FREQ / 5, INV_FREQ / 9))
    assert torch.equal(tables, expected(positions_B, inv_freq_B3))


@pytest.mark.parametrize("lengths", [[4], [5], [1, 4, 2], [3, 5, 4, 9], [9, 9, 1]])
def test_each_row_is_as_it_is_alone(lengths: list[int]) -> None:
    rotary = by_length()
    assert rotary.holds(max(lengths)) == (max(lengths) <= 4)
    tables = torch.stack(rotary.of_rows(rows_from_lengths(lengths, CPU), torch.float32))
    for length, table in zip(lengths, tables.split(lengths, dim=1), strict=True):
        inv_freq = INV_FREQ if length <= 4 else INV_FREQ / length
        assert torch.equal(table, expected(torch.arange(length), inv_freq))


def test_new_tokens_of_each_batch_row_go_by_its_own_length() -> None:
    positions = torch.tensor([[2, 3], [3, 4], [0, 8]])  # rows of 4, 5 and 9 tokens
    tables = torch.stack(by_length().of_positions(positions, torch.float32), dim=1)
    for row, inv_freq, table in zip(positions, (INV_FREQ, INV_FREQ / 5, INV_FREQ / 9), tables, strict=True):
        assert torch.equal(table, expected(row, inv_freq))


def test_rows_may_share_beginnings_up_to_the_reach_alone() -> None:
    """Rows of 3 and 4 tokens with 2 in common; then a token more."""
    whole, first = torch.tensor([0, 1, 2, 0, 1, 3, 4]), torch.tensor([0, 1, 2, 5, 6])
    rows = Rows((0, 3, 7), torch.tensor([0, 1, 2, 2, 3]), whole, first)
    tables = torch.stack(by_length().of_rows(rows, torch.float32))
    assert torch.equal(tables, expected(rows.positions_U, INV_FREQ))
    whole, first = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5]), torch.tensor([0, 1, 2, 5, 6, 7])
    rows = Rows((0, 3, 8), torch.tensor([0, 1, 2, 2, 3, 4]), whole, first)
    with pytest.raises(AssertionError, match="share beginnings"):
        by_length().of_rows(rows, torch.float32)


@pytest.mark.parametrize("lengths", [[2, 3], [2, 9]])
def test_tables_are_where_the_positions_are_and_of_the_dtype_asked_for(lengths: list[int]) -> None:
    """The meta device stands for a card: operands of two devices would not go together there either."""
    rows = rows_from_lengths(lengths, torch.device("meta"))
    for table in by_length().of_rows(rows, torch.bfloat16):
        assert (table.device.type, table.dtype, table.shape) == ("meta", torch.bfloat16, (sum(lengths), 6))
    rotary = Rotary(INV_FREQ)
    rotary.of_rows(rows, torch.float32)
    assert rotary.inv_freq.device.type == "meta", "moved once, not at every pass"
