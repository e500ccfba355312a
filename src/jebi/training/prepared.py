"""What a trainer does with data sets that it is given: one or several by name, tokenised, checked, perhaps packed."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerBase

from jebi.data.check import Contract, check_rows
from jebi.data.findings import Report
from jebi.data.long_rows import fit
from jebi.data.packing import pack
from jebi.data.preparation import UNCUT, FormattingFunc, Learn, Preparation
from jebi.data.rows import Rows, tokenize
from jebi.errors import ConfigError
from jebi.training.arguments import SFTConfig

logger = logging.getLogger(__name__)


def prepare_of(
    tokenizer: PreTrainedTokenizerBase | None,
    settings: SFTConfig | SimpleNamespace,
    longest: int,
    learn: Learn,
    formatting_func: FormattingFunc | None,
) -> "Prepare":
    """What prepares rows of up to ``longest`` tokens as the trainer's own settings say."""
    how = Preparation(
        max_length=longest,
        text_field=settings.dataset_text_field,
        formatting_func=formatting_func,
        learn=learn,
        workers=settings.dataset_num_proc,
    )
    return Prepare(tokenizer, how, settings.packing, settings.long, settings.overlap, tuple(settings.allow))


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

    def check(self, rows: Any, texts: list[Rows], heldout: Any, eos: Iterable[int], vocabulary: int) -> Report:
        """As `report`; what is found is logged, one line each, and what makes training pointless raises.

        Raises:
            CheckError: there is such a fault, and it is not allowed.
        """
        report = self.report(rows, texts, heldout, eos, vocabulary)
        report.require(self.allow)
        for line in report.lines(self.allow):
            logger.warning(line)
        return report

    def report(self, rows: Any, texts: list[Rows], heldout: Any, eos: Iterable[int], vocabulary: int) -> Report:
        """What is wrong with token rows.

        Args:
            rows: the token rows.
            texts: what they were made of, in the order of their numbers.
            heldout: token rows that are not to be trained on: none, one data set, or several by name.
            eos: what ends the model's answers beside the tokenizer's EOS.
            vocabulary: how many tokens the model has.
        """
        ready = None if self.how.formatting_func else self.how.text_field or "text"
        parts = heldout.values() if isinstance(heldout, dict) else [heldout]
        contract = Contract(self.how.max_length, tuple(eos), ready, vocabulary, self.all_drawn)
        return check_rows(rows, self.tokenizer, contract, texts, [part for part in parts if part is not None])
