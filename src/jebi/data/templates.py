"""How a row of questions and answers becomes text: one object for training, chat and comparison.

Shapes of text only; tokens are `data.rows`'.
"""

from dataclasses import dataclass
from string import Formatter

from jebi.errors import ConfigError

TUTORIAL = """아래에는 작업을 설명하는 지시 사항과 추가적인 컨텍스트를 제공하는 입력이 있습니다. \
요청을 적절하게 완료하는 응답을 작성하세요.

### instruction:
{instruction}

### input:
{input}

### output:
{output}"""

ALPACA = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""

NAMED = {"tutorial": TUTORIAL, "alpaca": ALPACA}
"""Templates with a name of their own."""

DEFAULT_TEMPLATE = "tutorial"

COLUMNS = ("instruction", "input", "output")
"""The columns a template fills in."""


@dataclass(frozen=True)
class Template:
    """A text with places for {instruction}, {input} and {output}; the answer's place is the last of them."""

    text: str
    """The text, as ``str.format`` takes it."""

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(f"template cannot be read: {error}. Write a literal brace twice.") from error
        places = [name for _, name, _, _ in parts if name is not None]
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise ConfigError("template: write {output}, not {output!r} or {output:9}.")
        unknown = set(places) - set(COLUMNS)
        if unknown or "instruction" not in places or places[-1:] != ["output"] or places.count("output") > 1:
            raise ConfigError(
                "template must be 'tutorial', 'alpaca', or a text with {instruction}, optionally {input}, "
                f"and {{output}} last; found {places or 'no places'}."
            )

    def row(self, instruction: str, input: str | None, output: str, eos: str) -> str:
        """The whole text of a training row, ended by ``eos``: without it a tuned model never stops."""
        return self.text.format(instruction=instruction, input=input or "", output=output) + eos

    def prompt(self, instruction: str, input: str | None = None) -> str:
        """The text up to where the answer begins."""
        before = self.text[: self.text.rindex("{output}")]
        return before.format(instruction=instruction, input=input or "")


def named(name_or_text: str) -> Template:
    """A named template, or the text itself as one."""
    return Template(NAMED.get(name_or_text, name_or_text))
