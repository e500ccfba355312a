"""Answers in ready texts, told by what opens them: for data sets of which nothing but the finished text is left.

The parts are looked for in characters, never in tokens, so it does not matter how a tokenizer cuts them. Where the
rows' turns are known, answers are found by rendering them (`data.chat_template`), and the parts are a check alone.
"""

from dataclasses import dataclass

from jebi.data.templates import Rendered
from jebi.errors import ConfigError, DataError


@dataclass(frozen=True)
class ResponseParts:
    """What a template writes before a question and before an answer."""

    instruction: str
    """Such as ``<|im_start|>user\\n``; an answer ends where one begins."""
    response: str
    """Such as ``<|im_start|>assistant\\n``."""

    def __post_init__(self) -> None:
        if not self.response.strip():
            raise ConfigError("response_part is empty: give what the template writes before an answer.")

    def find(self, text: str, last_only: bool = False) -> tuple[tuple[int, int, float], ...]:
        """Beginning, end and weight of every answer; the white space behind its last token is not learnt."""
        spans = []
        at = text.find(self.response)
        while at >= 0:
            start = at + len(self.response)
            ends = [n for n in (text.find(part, start) for part in (self.instruction, self.response) if part) if n >= 0]
            end = min(ends, default=len(text))
            spans.append((start, start + len(text[start:end].rstrip()), 1.0))
            at = text.find(self.response, end)
        return tuple(spans[-1:] if last_only else spans)

    def check(self, rendered: Rendered) -> None:
        """`DataError` unless the response part stands before every answer that was found."""
        for answer in rendered.answers:
            before = rendered.text[: answer.start]
            if not before.endswith(self.response.rstrip()) and not before.rstrip().endswith(self.response.rstrip()):
                raise DataError(
                    f"response_part {self.response!r} does not stand before the answer in turn {answer.turn}; the "
                    f"template writes {before[-40:]!r} there. Correct it, or leave both parts out."
                )
