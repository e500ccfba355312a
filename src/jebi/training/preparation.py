"""From the rows a user passes to those the trainer runs: tokenised, long ones dealt with, checked, packed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from jebi.data.check import Contract, check_rows
from jebi.data.findings import Report
from jebi.data.long_rows import UNCUT, fit
from jebi.data.packing import pack
from jebi.data.rows import FormattingFunc, Rows, tokenize
from jebi.errors import ConfigError


@dataclass(frozen=True)
class Preparation:
    """How rows are prepared; the fields are `SFTConfig`'s, defaults filled in."""

    tokenizer: PreTrainedTokenizerBase | None
    text_field: str
    formatting_func: FormattingFunc | None
    longest: int
    workers: int | None
    packing: bool
    long: str
    overlap: int

    def __call__(self, dataset: Any) -> Any:
        """A data set, or several by name, as the trainer runs them; nothing stays nothing."""
        if isinstance(dataset, dict):
            return {name: self(part) for name, part in dataset.items()}
        return self.packed(self.tokens(dataset))

    def tokens(self, dataset: Rows | None) -> Rows | None:
        """Token rows of `data.rows`, none longer than may be.

        Raises:
            ConfigError: there is no tokenizer.
            DataError: the rows cannot be used.
        """
        if dataset is None:
            return None
        rows = self.tokenized(dataset, self.longest if self.long == "cut" else UNCUT)
        return fit(rows, self.longest, self.long, self.overlap)

    def tokenized(self, dataset: Rows, limit: int) -> Rows:
        """Token rows cut to ``limit``."""
        if self.tokenizer is None:
            raise ConfigError("tokenizer is missing: pass tokenizer=tokenizer.")
        return tokenize(dataset, self.tokenizer, self.text_field, self.formatting_func, limit, self.workers)

    def packed(self, rows: Rows | None) -> Rows | None:
        """The same rows, packed where that is set."""
        return pack(rows, self.longest) if self.packing and rows is not None else rows

    def check(self, rows: Rows, texts: Rows, heldout: Any, eos: Iterable[int]) -> Report:
        """What is wrong with token rows that were made of ``texts``.

        Args:
            rows: what `tokens` made, not packed.
            texts: what it was made of.
            heldout: prepared rows that are not to be trained on: none, one data set, or several by name.
            eos: what ends the model's answers beside the tokenizer's EOS.
        """
        contract = Contract(self.longest, tuple(eos), None if self.formatting_func else self.text_field)
        parts = heldout.values() if isinstance(heldout, dict) else [heldout]
        return check_rows(rows, self.tokenizer, contract, texts, [part for part in parts if part is not None])
