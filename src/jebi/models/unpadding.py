"""Padded batches to flat rows and back, at the model's door.

Follows transformers' conventions: a 2-D attention mask marks padding; without one, positions that restart mark row
boundaries inside a sequence (its padding-free form).

Shapes: B batch, S tokens of a padded row, T real tokens, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.errors import ModelError
from jebi.nn.rows import Rows, rows_from_lengths, rows_from_positions

IGNORED = -100
"""The label of a token that is not learnt."""


@dataclass(frozen=True)
class Learnt:
    """The tokens whose next token is learnt: the head and the loss see only those."""

    index_N: Tensor
    """Their places among the flat tokens, int64."""
    labels_N: Tensor
    """Their next tokens."""
    counts_N: Tensor | None
    """How often each counts, float32; once when None."""

    def to(self, device: torch.device) -> "Learnt":
        """The same on another device."""
        counts_N = None if self.counts_N is None else self.counts_N.to(device, non_blocking=True)
        return Learnt(self.index_N.to(device, non_blocking=True), self.labels_N.to(device, non_blocking=True), counts_N)


def learnt_of(shifted: Tensor, counts: Tensor | None) -> Learnt:
    """Those of labels that are shifted already, in any shape."""
    flat = shifted.flatten()
    index_N = (flat != IGNORED).nonzero().flatten()
    return Learnt(index_N, flat[index_N], None if counts is None else counts.flatten()[index_N])


@dataclass(frozen=True)
class Layout:
    """How a (B, S) batch maps to T flat tokens."""

    real_T: Tensor | None
    """Flat index of each real token in B * S; None when every token is real."""
    rows: Rows
    """The flat rows."""

    def flatten(self, hidden_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (T, D)."""
        flat: Tensor = hidden_BSD.flatten(0, 1)
        return flat if self.real_T is None else flat[self.real_T]

    def restore(self, out_TD: Tensor, batch: torch.Size) -> Tensor:
        """(T, D) -> (B, S, D), zero where there is padding."""
        if self.real_T is not None:
            full_TD = out_TD.new_zeros(batch.numel(), out_TD.shape[1])
            out_TD = full_TD.index_copy(0, self.real_T, out_TD)
        out_BSD: Tensor = out_TD.unflatten(0, tuple(batch))
        return out_BSD


def lay_out(given: Tensor, mask_BS: Tensor | None, positions_BS: Tensor | None) -> Layout:
    """Find the real tokens and the row boundaries of a batch, of which ``given`` has the shape (B, S, ...).

    Raises:
        ModelError: the mask has another shape, nothing but padding, or padding inside a row.
    """
    batch, length = given.shape[:2]
    device = given.device
    if mask_BS is not None:
        mask_BS = padding_mask(mask_BS)
    if positions_BS is not None:
        positions_BS = positions_BS.expand(batch, length)
    if mask_BS is not None and not bool(mask_BS.all()):
        real_T = mask_BS.flatten().nonzero().flatten()
        if not len(real_T):
            raise ModelError("attention_mask marks every token as padding: mark real tokens with 1.")
        begins_B = mask_BS[:, 0] + (mask_BS[:, 1:] > mask_BS[:, :-1]).sum(1)
        if bool((begins_B > 1).any()):
            # transformers counts positions and windows over such padding; flat rows have none to count.
            raise ModelError("attention_mask has padding inside a row: it may stand before and behind rows only.")
        if positions_BS is not None:
            return Layout(real_T, _rows_at(positions_BS.flatten()[real_T], mask_BS.sum(1).tolist()))
        return Layout(real_T, rows_from_lengths([n for n in mask_BS.sum(1).tolist() if n], device))
    if positions_BS is not None:
        return Layout(None, _rows_at(positions_BS.flatten(), [length] * batch))
    return Layout(None, rows_from_lengths([length] * batch, device))


def padding_mask(mask: Tensor) -> Tensor:
    """An attention mask of any dtype as booleans (B, L), true for real tokens.

    Raises:
        ModelError: it is of another shape.
    """
    if mask.dim() != 2:
        raise ModelError("attention_mask must be (batch, tokens); 4-D masks are not supported.")
    return mask != 0


def shift_labels(labels_BS: Tensor, positions_BS: Tensor | None) -> Tensor:
    """The next token's label at each position; none at a row's last token, nor across restarting positions."""
    shifted_BS = torch.full_like(labels_BS, IGNORED)
    shifted_BS[:, :-1] = labels_BS[:, 1:]
    if positions_BS is not None and labels_BS.shape[1] > 1:
        restarts_BS = (positions_BS[:, 1:] == 0).expand(labels_BS.shape[0], -1)
        shifted_BS[:, :-1][restarts_BS] = IGNORED
    return shifted_BS


def _rows_at(positions_T: Tensor, lengths: list[int]) -> Rows:
    """Rows that begin where the batch's rows do and wherever the positions restart."""
    within = set(rows_from_positions(positions_T).starts)
    edges = {0}
    for length in lengths:
        edges.add(max(edges) + length)
    return Rows(tuple(sorted(within | edges)), positions_T)
