"""What the contract check may find: the codes, what each means, the way out, and when it stops a training.

How a fault is found is in `data.token_faults` and `data.text_faults`; docs/checks.md has a line for each code.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jebi.errors import CheckError, ConfigError

STOPS_FROM = 0.5
"""Share of the rows from which a fault that would spoil the training stops it: then it is the rule, no accident."""

SHOWN = 5
"""Row numbers that a finding gives as examples."""


@dataclass(frozen=True)
class Code:
    """A kind of fault."""

    meaning: str
    """What the rows have, as the end of "3 of 10 rows ...", and what comes of it."""
    way_out: str
    """What to do."""
    stops: bool = False
    """Whether training is pointless where most rows have it."""


CODES: dict[str, Code] = {
    "doubled-bos": Code(
        "begin with two BOS, which the model never saw",
        "take BOS out of the texts, or tokenise with add_special_tokens=False",
        stops=True,
    ),
    "missing-bos": Code(
        "lack the BOS that the tokenizer puts before every prompt",
        "tokenise with add_special_tokens=True, or put bos_token before the texts",
        stops=True,
    ),
    "missing-eos": Code(
        "do not end with an EOS, so the model does not learn to stop and repeats for ever",
        "end every text with tokenizer.eos_token",
        stops=True,
    ),
    "masked-eos": Code(
        "have the EOS behind a learnt answer masked, so the model does not learn to stop",
        "give the EOS its label",
        stops=True,
    ),
    "pad-is-eos": Code(
        "have their EOS masked as if it were padding, since pad_token equals eos_token",
        "give the EOS its label, or set another pad_token before masking padding",
        stops=True,
    ),
    "nothing-learnt": Code(
        "have no learnt token and are left out",
        "look at what masks them: markers that the template does not write, or a max_seq_length that ends "
        "before the answer",
        stops=True,
    ),
    "template-mismatch": Code(
        "are not in the form of the chat template saved beside the model, in which others will ask it",
        "use the tokenizer's template, or ask as jebi chat does, with the template of the training",
    ),
    "special-in-text": Code(
        "hold a control token of the tokenizer spelt out in their text",
        "take it out, unless the answer is to be about such tokens",
    ),
    "mojibake": Code(
        "hold text that was read in the wrong encoding (é as Ã©, 안녕 as ¾È³ç)",
        "set data.repair_encoding: true, or save the file again as UTF-8",
    ),
    "lost-characters": Code(
        "hold replacement characters (�): text was lost when it was read in the wrong encoding",
        "read the source again in its own encoding; this cannot be repaired from here",
    ),
    "rows-cut": Code(
        "are longer than max_seq_length and lose their end, the EOS included",
        "raise max_seq_length, or set data.long to split or refuse",
    ),
    "duplicates": Code(
        "repeat an earlier row, but for white space",
        "drop them, or the model learns them by heart",
    ),
    "empty-answers": Code(
        "have an empty answer, so the model learns to say nothing",
        "fill them in or drop them",
        stops=True,
    ),
    "leak": Code(
        "held out for measuring are trained on as well, so the held-out loss says nothing",
        "drop them from one of the two sets",
    ),
    "mostly-special": Code(
        "are almost only special or unknown tokens",
        "look at the texts: the tokenizer may not know their script",
        stops=True,
    ),
    "repetitive": Code(
        "repeat the same few words over and over",
        "drop them, or the model learns to loop",
    ),
}
"""Every code, in the order in which findings are shown."""


@dataclass(frozen=True)
class Finding:
    """One fault and the rows that have it."""

    code: str
    """A key of `CODES`."""
    count: int
    """Rows that have it."""
    of: int
    """Rows looked at."""
    examples: tuple[int, ...]
    """The first such rows, by their number in the data set, from 0."""

    @property
    def stops(self) -> bool:
        """Whether it makes training pointless."""
        return CODES[self.code].stops and self.count >= STOPS_FROM * self.of

    def line(self) -> str:
        """The finding in one line: what, how often, where, and the way out."""
        code = CODES[self.code]
        where = f"row{'s' if len(self.examples) > 1 else ''} {', '.join(map(str, self.examples))}"
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.code}: {self.count:,} of {self.of:,} rows ({where}{more}) {code.meaning}: {code.way_out}."


@dataclass(frozen=True)
class Report:
    """What the check found."""

    findings: tuple[Finding, ...]
    """In `CODES`' order."""
    rows: int
    """Rows looked at."""
    note: str | None = None
    """What was not looked at, where that is so."""

    def stopping(self, allow: Sequence[str] = ()) -> list[Finding]:
        """The findings that stop a training unless they are allowed."""
        return [finding for finding in self.findings if finding.stops and finding.code not in allow]

    def lines(self, allow: Sequence[str] = ()) -> Iterator[str]:
        """What there is to say where nothing stops: findings not silenced by ``allow``, and the note."""
        for finding in self.findings:
            if finding.code not in allow:
                yield finding.line()
        if self.note and self.findings:
            yield self.note

    def require(self, allow: Sequence[str] = ()) -> None:
        """`CheckError` with every finding that stops."""
        if stopping := self.stopping(allow):
            codes = " ".join(f"--allow {finding.code}" for finding in stopping)
            said = " ".join(finding.line() for finding in stopping)
            raise CheckError(f"the rows are not worth training on. {said} To train all the same: {codes}.")


def require_codes(names: Iterable[str], setting: str) -> None:
    """`ConfigError` for a name that is no code.

    Args:
        names: what the user allowed.
        setting: where, for the message.
    """
    for name in names:
        if name not in CODES:
            near = difflib.get_close_matches(str(name), CODES, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Codes: {', '.join(CODES)}."
            raise ConfigError(f"{setting}: '{name}' is no code of the check. {hint}")
