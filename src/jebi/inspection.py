"""The job of `jebi inspect`: a config's rows as a training would see them, and what is wrong with them.

Of the model only the tokenizer and the configs are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from jebi.config import RunConfig
from jebi.data.check import first_rows
from jebi.data.control_tokens import as_ids
from jebi.data.findings import Report
from jebi.data.flat_rows import FlatRows, Ints, flat
from jebi.data.long_rows import fit
from jebi.data.packing import pack
from jebi.data.preparation import UNCUT
from jebi.models.files import find
from jebi.run import arguments, preparation, read, token_rows
from jebi.training.prepared import Prepare


@dataclass(frozen=True)
class Inspection:
    """What `jebi inspect` shows."""

    rows: FlatRows
    """The token rows as they are trained on; of a stream the first ones."""
    lengths: Ints
    """Tokens of every row before any is cut or split."""
    tokenizer: PreTrainedTokenizerBase
    """Turns them back into text."""
    report: Report
    """What is wrong with them."""
    longest: int
    """``max_seq_length``."""
    long: str
    """What becomes of longer rows."""
    allowed: Sequence[str]
    """Codes that do not stop."""
    steps: str
    """Optimizer steps, and how they come about."""


def inspect(config: RunConfig) -> Inspection:
    """Prepare the rows as `run.train` would, and check them."""
    data, longest = config.data, config.model.max_seq_length
    rows, heldout = read(data)
    args = arguments(config, evaluates=bool(heldout))
    files = find(config.model.name, config.model.token)
    tokenizer, generation = files.tokenizer(), files.generation_config()
    ready = token_rows(rows, heldout, config, args, tokenizer, UNCUT)
    tokens = fit(ready.train, longest, data.long, data.overlap)
    eos = as_ids(generation.eos_token_id if generation else None)
    prepare = Prepare(tokenizer, preparation(data, longest), data.packing, all_drawn=ready.all_drawn)
    vocabulary = files.config().get_text_config().vocab_size
    report = prepare.report(tokens, ready.texts, ready.heldout, eos, vocabulary)
    packed = pack(tokens, longest) if data.packing else tokens
    sequences = len(packed) if isinstance(packed, Dataset) else None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return Inspection(
        rows=flat(first_rows(tokens)).cut(longest),
        lengths=flat(first_rows(ready.train)).lengths,
        tokenizer=tokenizer,
        report=report,
        longest=longest,
        long=data.long,
        allowed=data.allow,
        steps=steps_of(sequences, batch, args.max_steps, args.num_train_epochs),
    )


def steps_of(sequences: int | None, batch: int, max_steps: int, epochs: float) -> str:
    """How many optimizer steps a training takes.

    Args:
        sequences: what a batch counts, rows or packed ones; None of a stream.
        batch: of how many a step is made.
        max_steps: as in TrainingArguments; not above 0 leaves it to ``epochs``.
        epochs: ``num_train_epochs``.
    """
    if sequences is None:
        return f"{max_steps:,} of {batch} (max_steps)"
    epoch = math.ceil(sequences / batch)
    if max_steps > 0:
        return f"{max_steps:,} of {batch} (max_steps), {max_steps / epoch:.1f} epochs"
    return f"{math.ceil(epoch * epochs):,} of {batch} in {epochs:g} epochs"
