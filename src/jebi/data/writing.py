"""Rows of a data set as written ones: read as their format says, written by their template, what is learnt marked.

Ready texts are taken as they are; what is learnt of them is found where the columns they were made of still stand
beside them, or by the parts that open answers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from jebi.data import formats
from jebi.data.encoding import Encoder, Written
from jebi.data.formats import Format, at
from jebi.data.preparation import FormattingFunc, Preparation, format_of, learning, learnt_turns, template_for
from jebi.data.templates import Template
from jebi.data.turns import read_weight
from jebi.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Batch = dict[str, list[Any]]
"""Columns of several rows."""

Numbered = list[tuple[int, Written]]
"""Written rows with their numbers."""

_BAD_SHOWN = 3


@dataclass(frozen=True)
class ConversationWriter:
    """Rows of a format that has turns. Goes to other processes whole."""

    how: Preparation
    encoder: Encoder
    form: Format
    template: Template

    def write(self, batch: Batch, numbers: list[int]) -> Numbered:
        """The rows that can be read.

        Raises:
            DataError: one cannot, unless such rows are to be skipped.
        """
        written, bad = [], []
        for number, row in zip(numbers, examples(batch)):
            try:
                written.append((number, self._written(row, number)))
            except DataError as error:
                if not self.how.skip_bad_rows:
                    raise DataError(f"{error} data.bad_rows: skip leaves such rows out.") from error
                bad.append(str(error))
        if bad:
            shown = " ".join(bad[:_BAD_SHOWN])
            logger.warning(f"{len(bad)} of {len(numbers)} rows cannot be read and were left out. {shown}")
        return written

    def _written(self, columns: Mapping[str, Any], number: int) -> Written:
        row = formats.read_row(self.form, columns, number, self.how.roles)
        try:
            turns = learnt_turns(row, learning(self.how.learn, self.form))
            hidden = self.encoder.special.hide(row)
            rendered = self.template.render(hidden, tuple(turns or ()))
            _require_whole(rendered.text)
            if self.how.parts is not None:
                self.how.parts.check(rendered)
        except DataError as error:
            raise DataError(f"{at(number)}: {error}") from error
        spans = None
        if turns is not None:
            spans = tuple((answer.start, answer.end, turns[answer.turn]) for answer in rendered.answers)
        return Written(rendered.text, hidden is not row, self.template.whole, spans, row.weight)


@dataclass(frozen=True)
class TextWriter:
    """Rows that are ready texts, or of which the user's function makes them."""

    how: Preparation
    encoder: Encoder
    one: bool = True
    """Whether the user's function takes one example."""
    behind: ConversationWriter | None = None
    """What writes the columns that texts may have been made of, where their answers are to be told apart."""

    def write(self, batch: Batch, numbers: list[int]) -> Numbered:
        """Every row."""
        texts = self._texts(batch)
        if not _are_texts(texts, len(numbers)):
            raise DataError("every row must give one text; look at dataset_text_field or formatting_func.")
        written = []
        for number, text, row in zip(numbers, texts, examples(batch)):
            hidden = self._hidden(text, number)
            spans = self._spans(text, row, number) if self.how.learn in ("answers", "last_answer") else None
            weight = 1.0 if row.get("weight") is None else read_weight(row["weight"], at(number))
            written.append((number, Written(hidden, hidden != text, False, spans, weight)))
        return written

    def _hidden(self, text: str, number: int) -> str:
        try:
            _require_whole(text)
            return self.encoder.special.hide_text(text)
        except DataError as error:
            raise DataError(f"{at(number)}: {error}") from error

    def _spans(self, text: str, row: Mapping[str, Any], number: int) -> tuple[tuple[int, int, float], ...]:
        """Where the answers are: where rendering the turns puts them, or where the parts say."""
        if self.behind is not None:
            bos = str(self.encoder.tokenizer.bos_token or "")
            for _, made in self.behind.write({name: [value] for name, value in row.items()}, [number]):
                shift = len(made.text) - len(text)
                if made.text in (text, bos + text) and made.spans is not None:
                    return tuple((start - shift, end - shift, weight) for start, end, weight in made.spans)
        if self.how.parts is None:
            raise ConfigError(
                "ready texts do not say where their answers are: give the columns they were made of alone, or use "
                "train_on_responses_only with instruction_part and response_part."
            )
        return self.how.parts.find(text, self.how.learn == "last_answer")

    def _texts(self, batch: Batch) -> Any:
        function = self.how.formatting_func
        if function is None:
            return batch[self.how.text_field or "text"]
        if self.one:
            return [function(example) for example in examples(batch)]
        return function(batch)


def writer_for(
    first: dict[str, Any], columns: list[str], tokenizer: PreTrainedTokenizerBase, how: Preparation
) -> ConversationWriter | TextWriter:
    """What writes a data set's rows.

    Args:
        first: its first row.
        columns: its columns.
        tokenizer: has the chat template, and tells special tokens.
        how: the settings.

    Raises:
        DataError: the columns fit no format.
    """
    texts = Encoder(tokenizer, "", how.special_tokens or "tokens")
    if how.formatting_func is not None:
        return TextWriter(how, texts, _takes_one(how.formatting_func, first))
    form = format_of(columns, how)
    if form.read is not None:
        return _conversations(form, tokenizer, how)
    behind = None
    if how.learn in ("answers", "last_answer"):
        try:
            behind = _conversations(formats.recognise(n for n in columns if n != how.text_field), tokenizer, how)
        except (ConfigError, DataError) as error:
            logger.debug(f"nothing but the ready texts is there: {error}")
    return TextWriter(how, texts, behind=behind)


def _conversations(form: Format, tokenizer: PreTrainedTokenizerBase, how: Preparation) -> ConversationWriter:
    template = template_for(form, how.template, tokenizer)
    return ConversationWriter(how, Encoder(tokenizer, template.literals, how.special_tokens or "text"), form, template)


def _takes_one(formatting_func: FormattingFunc, example: dict[str, Any]) -> bool:
    """Whether it makes one text of one example. One written for batches makes something else of it, or fails."""
    try:
        return isinstance(formatting_func(dict(example)), str)
    except Exception:
        # Where it fails on a batch too, the user sees both errors.
        formatting_func({name: [value] for name, value in example.items()})
        return False


def examples(batch: Batch) -> list[dict[str, Any]]:
    """The rows of a batch of columns."""
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def _require_whole(text: str) -> None:
    """`DataError` for half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds {text[error.start]!a}, which is half a character: take it out.") from error


def _are_texts(texts: Any, count: int) -> bool:
    return isinstance(texts, list | tuple) and len(texts) == count and all(isinstance(text, str) for text in texts)
