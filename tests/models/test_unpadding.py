"""``models.unpadding``: padded batches to flat rows and back, and labels shifted within rows."""

import pytest
import torch

from jebi.errors import ModelError
from jebi.models.unpadding import lay_out, shift_labels

HIDDEN = torch.arange(24.0).view(2, 4, 3)


def test_without_padding_every_batch_row_is_a_row() -> None:
    for mask in (None, torch.ones(2, 4)):
        layout = lay_out(HIDDEN, mask, None)
        assert layout.real_T is None
        assert layout.rows.starts == (0, 4, 8)
        assert layout.rows.positions_U.tolist() == [0, 1, 2, 3] * 2
        assert torch.equal(layout.restore(layout.flatten(HIDDEN), HIDDEN.shape[:2]), HIDDEN)


@pytest.mark.parametrize(
    ("mask", "starts"),
    [
        ([[1, 1, 1, 0], [1, 1, 0, 0]], (0, 3, 5)),
        ([[0, 1, 1, 1], [0, 0, 0, 1]], (0, 3, 4)),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], (0, 4)),  # a row of padding alone
    ],
)
def test_padding_is_left_out_and_restored_as_zeros(mask: list[list[int]], starts: tuple[int, ...]) -> None:
    real = torch.tensor(mask)
    layout = lay_out(HIDDEN, real, None)
    assert layout.rows.starts == starts
    flat = layout.flatten(HIDDEN)
    assert torch.equal(flat, HIDDEN[real.bool()])
    assert torch.equal(layout.restore(flat, HIDDEN.shape[:2]), HIDDEN * real[..., None])


def test_restarting_positions_divide_a_batch_row() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    layout = lay_out(HIDDEN, None, positions)
    assert layout.rows.starts == (0, 2, 4, 5, 8)
    assert torch.equal(layout.rows.positions_U, positions.flatten())


def test_positions_that_go_on_do_not_join_batch_rows() -> None:
    assert lay_out(HIDDEN, None, torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])).rows.starts == (0, 4, 8)


def test_one_row_of_positions_serves_the_batch() -> None:
    assert lay_out(HIDDEN, None, torch.arange(4)[None]).rows.starts == (0, 4, 8)


def test_positions_beside_a_mask() -> None:
    positions, mask = torch.tensor([[1, 0, 1, 2], [0, 1, 0, 5]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    layout = lay_out(HIDDEN, mask, positions)
    assert layout.rows.starts == (0, 3, 5, 6)
    assert layout.rows.positions_U.tolist() == [0, 1, 2, 0, 1, 0]


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="4-D masks are not supported"):
        lay_out(HIDDEN, torch.ones(2, 1, 4, 4), None)


@pytest.mark.parametrize("positions", [None, torch.arange(4)[None]])
def test_padding_inside_a_row_is_refused(positions: torch.Tensor | None) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(ModelError, match="padding inside a row"):
        lay_out(HIDDEN, mask, positions)


def test_padding_alone_is_refused() -> None:
    with pytest.raises(ModelError, match="every token as padding"):
        lay_out(HIDDEN, torch.zeros(2, 4), None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    layout = lay_out(HIDDEN, torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).to(dtype), None)
    assert layout.rows.starts == (0, 3, 5)


def test_labels_are_the_next_tokens_within_a_row() -> None:
    labels = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert shift_labels(labels, None).tolist() == [[11, 12, 13, -100], [21, 22, 23, -100]]
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    assert shift_labels(labels, positions).tolist() == [[11, -100, 13, -100], [21, 22, -100, -100]]
    assert shift_labels(labels, positions[:1]).tolist() == [[11, -100, 13, -100], [21, -100, 23, -100]]
    assert shift_labels(labels[:, :1], positions[:, :1]).tolist() == [[-100], [-100]]
