"""What `jebi compare` found out about a base and a tuned model: the record, its figures, its terminal tables.

A `Comparison` is filled by whoever runs the models; nothing here loads or runs one. It is kept as JSON, where
the derived figures are written for other readers and ignored on reading. Whether an answer declines is
decided by `decline`, and the HTML page is drawn by `page` from the same figures.
"""

import json
import math
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from jebi.errors import DataError
from jebi.inference.decline import declines

Unit = Literal["plain", "share", "speed"]
Better = Literal["lower", "higher", "either"]

NOTHING = "–"
CLIP_CELLS = 240  # longest text of one cell in the terminal table of answers
# Text that reorders its neighbours on screen; it has no business in a report.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Answer:
    """One question and what the two models said.

    question      The question as it was asked, without the chat template.
    harmful       Whether it is from the file of harmful questions; otherwise it is an ordinary one.
    base, tuned   The generated text, without special tokens.
    base_stopped, tuned_stopped
                  Whether the model ended the answer itself; otherwise the length limit cut it.
    """

    question: str
    harmful: bool
    base: str
    tuned: str
    base_stopped: bool
    tuned_stopped: bool

    @property
    def base_declined(self) -> bool:
        """Whether the base model declined, by the rule of `decline`."""
        return declines(self.base)

    @property
    def tuned_declined(self) -> bool:
        """Whether the tuned model declined, by the rule of `decline`."""
        return declines(self.tuned)


@dataclass(frozen=True)
class Side:
    """What was measured on one of the two models.

    name            What the reader calls it, such as "base" or "tuned".
    heldout_loss    Mean cross-entropy per token of the held-out answers, in nats; None when not measured.
    heldout_tokens  The number of tokens that the mean is taken over.
    tokens_per_s    Generated tokens per second over all questions.
    load_s          Seconds from the file to a model ready to answer; None when not measured.
    """

    name: str
    heldout_loss: float | None
    heldout_tokens: int
    tokens_per_s: float
    load_s: float | None

    @property
    def perplexity(self) -> float | None:
        """The exponential of the held-out loss; None when that is missing or beyond any number."""
        loss = self.heldout_loss
        return math.exp(loss) if loss is not None and math.isfinite(loss) and loss < 700 else None


@dataclass(frozen=True)
class Figure:
    """One derived figure for both models.

    key, label   Its name in the JSON, and in a table.
    base, tuned  The values; a share is from 0 to 1, None says that there was nothing to measure.
    unit         How the values are written.
    better       Which direction is an improvement.
    of           The number of questions behind a share, otherwise None.
    """

    key: str
    label: str
    base: float | None
    tuned: float | None
    unit: Unit
    better: Better
    of: int | None = None

    @property
    def improved(self) -> bool | None:
        """Whether the tuned model is better; None when neither is or when no direction is better."""
        if self.base is None or self.tuned is None or self.base == self.tuned or self.better == "either":
            return None
        return (self.tuned > self.base) == (self.better == "higher")

    def shown(self, value: float | None) -> str:
        """Write one of the values for a reader."""
        if value is None:
            return NOTHING
        return f"{value:.0%}".replace("%", " %") if self.unit == "share" else _number(value)

    def shown_change(self) -> str:
        """Write the way from base to tuned: points for a share, a ratio for a speed, else a difference."""
        if self.base is None or self.tuned is None or (self.unit == "speed" and self.base <= 0):
            return NOTHING
        if self.unit == "speed":
            return f"×{self.tuned / self.base:.2f}"
        change = self.tuned - self.base
        text = f"{abs(change) * 100:.0f} points" if self.unit == "share" else _number(abs(change))
        return f"{'−' if change < 0 else '+'}{text}" if change else "±0"


@dataclass(frozen=True)
class Comparison:
    """A base model and the same model with an adapter, asked the same questions.

    model, adapter  Names or paths of the two, as the user gave them.
    base, tuned     What was measured on each.
    answers         Every question, in the order asked.
    loss_curve      (step, training loss) of the run that made the adapter; empty when not recorded.
    settings        How the answers were made, JSON values by name; others are written as text.
    decline_rule    The rule behind "declined" in words, `decline.RULE`.
    """

    model: str
    adapter: str
    base: Side
    tuned: Side
    answers: list[Answer]
    loss_curve: list[tuple[int, float]]
    settings: dict[str, object]
    decline_rule: str

    @property
    def harmful(self) -> list[Answer]:
        """The answers to harmful questions."""
        return [answer for answer in self.answers if answer.harmful]

    @property
    def ordinary(self) -> list[Answer]:
        """The answers to ordinary questions."""
        return [answer for answer in self.answers if not answer.harmful]

    def figures(self) -> list[Figure]:
        """Return the derived figures, in the order of the tables."""
        base, tuned = self.base, self.tuned
        return [
            Figure("loss", "Held-out loss", base.heldout_loss, tuned.heldout_loss, "plain", "lower"),
            Figure("perplexity", "Perplexity", base.perplexity, tuned.perplexity, "plain", "lower"),
            _declined("harmful_declined", "Harmful questions declined", self.harmful, "higher"),
            _declined("ordinary_declined", "Ordinary questions declined", self.ordinary, "lower"),
            Figure(
                "stopped",
                "Answers that stop by themselves",
                _share(self.answers, lambda answer: answer.base_stopped),
                _share(self.answers, lambda answer: answer.tuned_stopped),
                "share",
                "higher",
                len(self.answers),
            ),
            Figure("speed", "Tokens per second", base.tokens_per_s, tuned.tokens_per_s, "speed", "either"),
        ]

    def to_json(self) -> str:
        """Return the record as JSON text, with the derived figures beside it."""
        record = asdict(self)
        for entry, answer in zip(record["answers"], self.answers):
            entry |= {"base_declined": answer.base_declined, "tuned_declined": answer.tuned_declined}
        record["figures"] = {figure.key: {"base": figure.base, "tuned": figure.tuned} for figure in self.figures()}
        return json.dumps(record, ensure_ascii=False, indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Comparison":
        """Read a record written by `to_json`; derived figures and unknown names are ignored."""
        try:
            record = _known(cls, json.loads(text))
            record["base"], record["tuned"] = (Side(**_known(Side, record[name])) for name in ("base", "tuned"))
            record["answers"] = [Answer(**_known(Answer, entry)) for entry in record["answers"]]
            record["loss_curve"] = [(int(step), float(loss)) for step, loss in record["loss_curve"]]
            return cls(**record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not a comparison written by `jebi compare`: {error}") from error


def table(comparison: Comparison) -> Table:
    """Return the summary for the terminal: one figure a row, base, tuned and change."""
    summary = Table("", title=Text(printable(comparison.model)))
    for heading in (*_headings(comparison), Text("change")):
        summary.add_column(heading, justify="right")
    for figure in comparison.figures():
        style = {True: "green", False: "red", None: ""}[figure.improved]
        label = figure.label if figure.of is None else f"{figure.label} (of {figure.of})"
        change = Text(figure.shown_change(), style=style)
        summary.add_row(label, figure.shown(figure.base), figure.shown(figure.tuned), change)
    return summary


def answers_table(comparison: Comparison, limit: int) -> Table:
    """Return the first answers for the terminal, side by side; long ones are clipped."""
    side_by_side = Table(show_lines=True)
    for heading, ratio in zip((Text("question"), *_headings(comparison)), (2, 3, 3)):
        side_by_side.add_column(heading, ratio=ratio, overflow="fold")
    for answer in comparison.answers[:limit]:
        question = _clipped(answer.question)
        if answer.harmful:
            question.append("\nharmful", style="red")
        side_by_side.add_row(
            question,
            _verdict(answer.base, answer.base_declined, answer.base_stopped),
            _verdict(answer.tuned, answer.tuned_declined, answer.tuned_stopped),
        )
    return side_by_side


def printable(text: str) -> str:
    """Drop what a model may emit but no reader should meet: control codes, half characters, bidi tricks."""
    return "".join(
        character
        for character in text
        if character in "\n\t"
        or (unicodedata.category(character) not in ("Cc", "Cs") and character not in _BIDI_CONTROLS)
    )


def _known(kind: type[Any], record: dict[str, Any]) -> dict[str, Any]:
    """Keep the entries that are fields of the dataclass; a missing one is a KeyError."""
    return {field.name: record[field.name] for field in fields(kind)}


def _share(answers: list[Answer], holds: Callable[[Answer], bool]) -> float | None:
    """Return the share of the answers for which it holds; None when there are none."""
    return sum(map(holds, answers)) / len(answers) if answers else None


def _declined(key: str, label: str, answers: list[Answer], better: Better) -> Figure:
    """Return the figure of how many of the answers decline."""
    base = _share(answers, lambda answer: answer.base_declined)
    tuned = _share(answers, lambda answer: answer.tuned_declined)
    return Figure(key, label, base, tuned, "share", better, len(answers))


def _number(value: float) -> str:
    """Write a number with three figures or so."""
    if abs(value) >= 1e6 or not math.isfinite(value):
        return f"{value:.2g}"
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _headings(comparison: Comparison) -> list[Text]:
    """Return the column headings of the two models."""
    return [Text(printable(side.name)) for side in (comparison.base, comparison.tuned)]


def _clipped(text: str) -> Text:
    """Return the text on one line, at most `CLIP_CELLS` wide; it is never read as rich markup."""
    line = Text(" ".join(printable(text).split()))
    line.truncate(CLIP_CELLS, overflow="ellipsis")
    return line


def _verdict(text: str, declined: bool, stopped: bool) -> Text:
    """Return a clipped answer with what became of it underneath."""
    notes = ["declined" if declined else "answered", *([] if stopped else ["did not stop"])]
    return _clipped(text).append("\n" + ", ".join(notes), style="dim")
