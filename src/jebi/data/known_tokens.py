"""Token rows held against the tokens that the model has; an embedding is not asked for rows that it does not have."""

from functools import partial

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from jebi.data.flat_rows import FlatRows, Ints
from jebi.models.unpadding import IGNORED
from jebi.models.vocabulary import require_known


def require_known_tokens(rows: FlatRows, vocabulary: int, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """`DataError` for a token, or one to be learnt, that a model with so many does not have: nothing is learnt of it.

    It names the row and, where the ``tokenizer`` has the token, its text.
    """
    for ids in (rows.ids, np.where(rows.labels == IGNORED, 0, rows.labels)):
        require_known(torch.from_numpy(ids), vocabulary, partial(_whose, rows, ids, tokenizer))


def _whose(rows: FlatRows, ids: Ints, tokenizer: PreTrainedTokenizerBase | None, place: int) -> str:
    row = f"row {rows.numbers[rows.row_of()[place]]}"
    if tokenizer is None or not 0 <= ids[place] < len(tokenizer):
        return row
    return f"{row} ({tokenizer.convert_ids_to_tokens(int(ids[place]))!r})"
