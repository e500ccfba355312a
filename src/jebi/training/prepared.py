"""What a trainer does with data sets that it is given: one or several by name, tokenised and perhaps packed."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from jebi.data.packing import pack
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize
from jebi.errors import ConfigError


@dataclass
class Prepare:
    """Makes token rows of raw ones."""

    tokenizer: PreTrainedTokenizerBase | None
    how: Preparation
    packed: bool

    def __call__(self, dataset: Any) -> Any:
        """A data set, a dictionary of them, or nothing, as token rows."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self(part) for name, part in dataset.items()}
        if self.tokenizer is None:
            raise ConfigError("tokenizer is missing: pass tokenizer=tokenizer.")
        rows = tokenize(dataset, self.tokenizer, self.how)
        return pack(rows, self.how.max_length) if self.packed else rows
