"""How a conversation becomes text: one object for training, chat, comparison and export.

A template writes a row, tells where in the text its answers are, and writes the prompt to which an answer is to come.
Here are those with places for one question and one answer; a chat template is `data.chat_template`'s. Tokens are
`data.encoding`'s.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Protocol

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation
from jebi.errors import ConfigError, DataError

_MARKS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")

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

ALPACA_NO_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
{output}"""

CHAT = "chat"
"""Name of the tokenizer's own chat template."""

DEFAULTS = {"alpaca": "tutorial", "prompt_completion": "bare", "messages": CHAT, "sharegpt": CHAT}
"""The template of each format where the config names none."""

_PLACES = ("instruction", "input", "output")


@dataclass(frozen=True)
class Answer:
    """Where a turn of the model's is in a text, its end-of-turn token included."""

    turn: int
    """Number of the turn."""
    start: int
    """The first character that the model has to write."""
    end: int
    """One past the last, which is the end-of-turn token's."""


@dataclass(frozen=True)
class Rendered:
    """A written row."""

    text: str
    """The whole text."""
    answers: tuple[Answer, ...] = ()
    """The answers asked for, in order."""


class Template(Protocol):
    """What writes conversations."""

    @property
    def spec(self) -> str:
        """What `named` makes the same template of; it is saved beside an adapter."""
        ...

    @property
    def literals(self) -> str:
        """Everything the template itself may write, to tell its tokens from a row's."""
        ...

    @property
    def whole(self) -> bool:
        """Whether it writes BOS itself, so that a tokenizer must not add its own."""
        ...

    def render(self, row: Conversation, learnt: tuple[int, ...] = ()) -> Rendered:
        """Write a row and find these turns' answers.

        Raises:
            DataError: the template cannot write the row; the message does not name it.
        """
        ...

    def prompt(self, row: Conversation) -> str:
        """Write turns up to where an answer to them begins."""
        ...


@dataclass(frozen=True)
class TextTemplate:
    """A text with places for {instruction}, {input} and {output}; the answer's place is the last of them."""

    spec: str
    """A name in `NAMED`, or the text."""
    text: str
    """The text, as ``str.format`` takes it."""
    eos: str
    """Ends a row: without it a tuned model never stops."""
    without_input: str | None = None
    """The text for questions without further context, where that is another one."""
    whole: bool = False
    """The tokenizer adds its BOS."""

    def __post_init__(self) -> None:
        require_places(self.text)

    @property
    def literals(self) -> str:
        """The texts and EOS."""
        return f"{self.text}\0{self.without_input or ''}\0{self.eos}"

    def render(self, row: Conversation, learnt: tuple[int, ...] = ()) -> Rendered:
        """Write a question and its answer, ended by EOS."""
        *asked, answer = row.turns
        if answer.role != "assistant":
            raise DataError(f"the row ends with a turn of role '{answer.role}', so there is no answer to learn.")
        prompt = self.prompt(Conversation(tuple(asked), row.tools))
        if answer.tool_calls or answer.reasoning:
            raise self._too_much("tool calls and reasoning")
        after = self._text_for(row)[self._text_for(row).rindex("{output}") :].format(output=answer.content)
        text = prompt + after + self.eos
        found = Answer(len(row.turns) - 1, len(prompt), len(text))
        return Rendered(text, (found,) if found.turn in learnt else ())

    def prompt(self, row: Conversation) -> str:
        """The text up to where the answer begins."""
        if [turn.role for turn in row.turns] != ["user"]:
            raise self._too_much(f"{len(row.turns)} turns ({', '.join(turn.role for turn in row.turns)}) before it")
        if row.tools:
            raise self._too_much("tools")
        text, asked = self._text_for(row), row.turns[0]
        return text[: text.rindex("{output}")].format(instruction=asked.content, input=asked.input)

    def _text_for(self, row: Conversation) -> str:
        return self.text if row.turns[0].input or self.without_input is None else self.without_input

    def _too_much(self, what: str) -> DataError:
        name = self.spec if self.spec in NAMED else "the text"
        return DataError(f"template '{name}' holds one question and one answer, not {what}: set data.template: {CHAT}.")


NAMED: dict[str, tuple[str, str | None]] = {
    "tutorial": (TUTORIAL, None),
    "alpaca": (ALPACA, ALPACA_NO_INPUT),
    "bare": ("{instruction}{output}", None),
}
"""Templates with a name of their own, and their texts for questions without input."""


def named(spec: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a name, of a text with places, or of a Jinja chat template.

    Args:
        spec: ``tutorial``, ``alpaca``, ``bare`` (prompt and completion as they stand), ``chat`` (the tokenizer's own),
            a text with {instruction} and {output}, a Jinja chat template, or the path of one ending in .jinja.
        tokenizer: gives EOS, and its chat template.

    Raises:
        ConfigError: it is none of these, or the tokenizer has no chat template.
    """
    from jebi.data.chat_template import ChatTemplate

    if spec in NAMED:
        text, without_input = NAMED[spec]
        return TextTemplate(spec, text, _eos(tokenizer), without_input)
    if spec == CHAT:
        return ChatTemplate(tokenizer)
    if _is_jinja(spec):
        return ChatTemplate(tokenizer, _jinja(spec))
    require_places(spec)
    return TextTemplate(spec, spec, _eos(tokenizer))


def check(spec: str) -> None:
    """`ConfigError` for what cannot be a template, before any tokenizer is loaded."""
    if spec in (*NAMED, CHAT):
        return
    if _is_jinja(spec):
        _jinja(spec)
    else:
        require_places(spec)


def require_places(text: str) -> None:
    """`ConfigError` unless the text has the places of a question and, last, of its answer."""
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"template cannot be read: {error}. Write a literal brace twice.") from error
    places = [name for _, name, _, _ in parts if name is not None]
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise ConfigError("template: write {output}, not {output!r} or {output:9}.")
    unknown = set(places) - set(_PLACES)
    if unknown or "instruction" not in places or places[-1:] != ["output"] or places.count("output") > 1:
        raise ConfigError(
            "template must be 'tutorial', 'alpaca', 'bare', 'chat', a Jinja chat template, or a text with "
            f"{{instruction}}, optionally {{input}}, and {{output}} last; found {places or 'no places'}."
        )


def _is_jinja(spec: str) -> bool:
    return spec.endswith(".jinja") or ("messages" in spec and ("{%" in spec or "{{" in spec))


def _jinja(spec: str) -> str:
    """A Jinja template's text, from its file where a path was given; `ConfigError` where it is no Jinja."""
    text, name = spec, "data.template"
    if spec.endswith(".jinja"):
        try:
            text, name = Path(spec).expanduser().read_text(encoding="utf-8"), f"template '{spec}'"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"template '{spec}' cannot be read: {error}.") from error
    try:
        # Marks of what is generated are transformers' own.
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", text))
    except TemplateSyntaxError as error:
        raise ConfigError(f"{name} is no Jinja: {error.message} (line {error.lineno}).") from error
    return text


def _eos(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise ConfigError("the tokenizer has no EOS, so no answer could end: set tokenizer.eos_token.")
    return str(tokenizer.eos_token)
