"""What a trainer does with data sets that it is given: one or several by name, tokenised, checked, perhaps packed."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from jebi.data.check import Contract, check_rows
from jebi.data.findings import Report
from jebi.data.long_rows import fit
from jebi.data.packing import pack
from jebi.data.preparation import UNCUT, FormattingFunc, Preparation
from jebi.data.rows import Rows, tokenize
from jebi.errors import ConfigError
from jebi.training.arguments import SFTConfig, first_given, learning_of

logger = logging.getLogger(__name__)


@dataclass
class Prepare:
    """Makes token rows of raw ones."""

    tokenizer: PreTrainedTokenizerBase | None
    how: Preparation
    packed: bool
    long: str = "cut"
    overlap: int = 0
    allow: tuple[str, ...] = ()
    all_drawn: bool = True
    """As `Contract.all_drawn`."""

    def __call__(self, dataset: Any) -> Any:
        """A data set, a dictionary of them, or nothing, as token rows."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self(part) for name, part in dataset.items()}
        if self.tokenizer is None:
            raise ConfigError("tokenizer is missing: pass tokenizer=tokenizer.")
        how = self.how if self.long == "cut" else replace(self.how, max_length=UNCUT)
        rows = tokenize(dataset, self.tokenizer, how)
        rows = fit(rows, self.how.max_length, self.long, self.overlap)
        return pack(rows, self.how.max_length) if self.packed else rows

    def check(self, rows: Any, texts: list[Rows], heldout: Any, eos: Iterable[int]) -> Report:
        """As `report`; what is found is logged, one line each, and what makes training pointless raises.

        Raises:
            CheckError: there is such a fault, and it is not allowed.
        """
        report = self.report(rows, texts, heldout, eos)
        report.require(self.allow)
        for line in report.lines(self.allow):
            logger.warning(line)
        return report

    def report(self, rows: Any, texts: list[Rows], heldout: Any, eos: Iterable[int]) -> Report:
        """What is wrong with token rows.

        Args:
            rows: the token rows.
            texts: what they were made of, in the order of their numbers.
            heldout: token rows that are not to be trained on: none, one data set, or several by name.
            eos: what ends the model's answers beside the tokenizer's EOS.
        """
        ready = None if self.how.formatting_func else self.how.text_field or "text"
        parts = heldout.values() if isinstance(heldout, dict) else [heldout]
        contract = Contract(self.how.max_length, tuple(eos), ready, self.all_drawn)
        return check_rows(rows, self.tokenizer, contract, texts, [part for part in parts if part is not None])


def preparing(
    tokenizer: PreTrainedTokenizerBase | None,
    args: TrainingArguments,
    max_length: int,
    text_field: str | None,
    formatting_func: FormattingFunc | None,
    workers: int | None,
    packing: bool | None,
) -> Prepare:
    """What a trainer's arguments make of rows; a keyword of its own, where given, wins over `SFTConfig`'s field."""
    config = args if isinstance(args, SFTConfig) else None
    how = Preparation(
        max_length=max_length,
        text_field=first_given(text_field, config and config.dataset_text_field, "text"),
        formatting_func=formatting_func,
        learn=learning_of(args),
        workers=first_given(workers, config and config.dataset_num_proc),
    )
    own = (config.long, config.overlap, tuple(config.allow)) if config else ()
    return Prepare(tokenizer, how, bool(first_given(packing, config and config.packing)), *own)
