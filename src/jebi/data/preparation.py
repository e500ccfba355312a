"""How rows become tokens: every setting in one object, and what follows from it for a data set's columns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from jebi.data import formats
from jebi.data.conversation import Conversation
from jebi.data.formats import Format
from jebi.data.responses import ResponseParts
from jebi.data.special_tokens import Policy
from jebi.data.templates import DEFAULTS, Template, named
from jebi.errors import DataError

FormattingFunc = Callable[[dict[str, Any]], str | list[str]]
"""One example, or a batch of columns, to its text or texts."""

UNCUT = 2**31
"""A ``max_length`` that leaves every row whole."""

Learn = Literal["auto", "all", "answers", "last_answer"]
"""What is learnt: the whole text; the answers, each with its end-of-turn token; the last of them. ``auto`` is the whole
text, but of prompt and completion the completion."""


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens."""

    max_length: int
    """Longer rows are cut."""
    text_field: str | None = "text"
    """Column of ready texts, taken where it is there; None takes none without ``format: text``."""
    formatting_func: FormattingFunc | None = None
    """Makes ready texts instead; per example or per batch of columns."""
    format: str | None = None
    """A name in `formats.FORMATS`; None recognises it."""
    template: str | None = None
    """What `templates.named` takes; None is the format's default."""
    learn: Learn = "auto"
    """What is learnt."""
    special_tokens: Policy | None = None
    """What special tokens in the rows' texts become; None is text, and tokens in ready texts."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """Roles of the data set's own, such as ``{"narrator": "user"}``."""
    skip_bad_rows: bool = False
    """Leave out, with a notice, rows that cannot be read; they are errors otherwise."""
    parts: ResponseParts | None = None
    """Where answers begin in ready texts, or a check on where they were found."""
    workers: int | None = None
    """Processes that share the work."""
    first_row: int = 0
    """Number of the first row, where others come before it."""


def format_of(columns: list[str], how: Preparation) -> Format:
    """The format named, or ready texts where their column is there, or the one recognised."""
    if how.format == "text" and how.text_field is not None:
        if how.text_field not in columns:
            raise DataError(f"data.text_field '{how.text_field}' is no column. There are: {', '.join(columns)}.")
        return formats.FORMATS["text"]
    if how.format is not None:
        return formats.format_named(how.format, columns)
    if how.text_field is None:
        return formats.recognise(columns)
    if how.text_field in columns:
        return formats.FORMATS["text"]
    try:
        return formats.recognise(columns)
    except DataError as error:
        raise DataError(
            f"dataset_text_field '{how.text_field}' is no column. There are: {', '.join(columns)}. "
            f"Name one of them, or pass formatting_func. Besides, {error}"
        ) from error


def template_for(form: Format, spec: str | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template asked for, or the format's default."""
    return named(spec or DEFAULTS[form.name], tokenizer)


def learnt_turns(row: Conversation, learn: Learn) -> dict[int, float] | None:
    """Which turns are learnt, and how much each counts; None where the whole text is.

    A row that weighs its turns itself is learnt by answers, since weights are the answers'.
    """
    weighs = any(turn.weight is not None for turn in row.turns)
    if learn == "all" and not weighs:
        return None
    answers = [number for number in row.answers if not row.turns[number].given]
    if learn == "last_answer":
        answers = answers[-1:]
    weights = {number: row.turns[number].weight for number in answers}
    return {number: 1.0 if weight is None else weight for number, weight in weights.items() if weight != 0}


def learning(learn: Learn, form: Format) -> Learn:
    """What is learnt of rows of a format, ``auto`` made out."""
    if learn != "auto":
        return learn
    return "answers" if form.name == "prompt_completion" else "all"
