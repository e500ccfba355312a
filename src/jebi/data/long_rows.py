"""Rows longer than ``max_seq_length``: split into pieces, or refused by their number. Cutting is `data.rows`'.

A piece goes on ``overlap`` tokens before the end of the piece before it, so that it has something to read first. Those
tokens are learnt once, in the earlier piece. One token is repeated at least: a first token, which nothing precedes, is
not learnt, and it may be the EOS.
"""

from typing import Any

from jebi.data.rows import Rows
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

CHOICES = ("cut", "split", "refuse")
"""What may happen to a long row."""


def require_choice(long: str, overlap: int, longest: int | None) -> None:
    """`ConfigError` for settings that contradict each other; ``longest`` where it is known."""
    if long not in CHOICES:
        raise ConfigError(f"long must be one of {', '.join(CHOICES)}, not '{long}'.")
    if overlap and long != "split":
        raise ConfigError(f"overlap={overlap} does nothing with long='{long}': set long to split, or drop overlap.")
    if overlap < 0 or (longest is not None and overlap >= longest):
        raise ConfigError(
            f"overlap={overlap} must be from 0 to below max_seq_length{f'={longest}' if longest else ''}."
        )


def fit(rows: Rows, longest: int, long: str, overlap: int) -> Rows:
    """Token rows of `data.rows`, none longer than ``longest``.

    Args:
        rows: token rows of any length.
        longest: ``max_seq_length``.
        long: "split" or "refuse"; "cut" has been done before.
        overlap: tokens that two pieces share.

    Raises:
        ConfigError: the settings contradict each other.
        DataError: a row is too long, and is to be refused.
    """
    require_choice(long, overlap, longest)

    def refuse(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for number, ids in zip(batch["row"], batch["input_ids"]):
            if len(ids) > longest:
                raise DataError(
                    f"row {number[0]} has {len(ids)} tokens, and long rows are refused (data.long): "
                    f"drop or shorten it, raise max_seq_length={longest}, or set data.long to cut or split."
                )
        return batch

    def split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in batch}
        for values in zip(*batch.values()):
            for piece in _pieces(dict(zip(batch, values)), longest, overlap):
                for name, value in piece.items():
                    made[name].append(value)
        return made

    return rows if long == "cut" else rows.map(refuse if long == "refuse" else split, batched=True)


def _pieces(row: dict[str, Any], longest: int, overlap: int) -> list[dict[str, Any]]:
    """The row's pieces that teach something; columns with a value for each token are cut along."""
    size, overlap = len(row["input_ids"]), max(overlap, 1)
    per_token = [name for name, value in row.items() if isinstance(value, list) and len(value) == size > 1]
    pieces = []
    for begin in range(0, max(size - overlap, 1), max(longest - overlap, 1)):
        end = min(begin + longest, size)
        piece = row | {name: row[name][begin:end] for name in per_token} | {"lengths": [end - begin]}
        if begin:
            piece["labels"] = [IGNORED] * overlap + piece["labels"][overlap:]
        if any(label != IGNORED for label in piece["labels"][1:]):
            pieces.append(piece)
    return pieces
