"""Chat templates: transformers renders them, and here is found which characters of the result are the answers.

No ``{% generation %}`` markers are needed and no text is searched for what a template is thought to write. An answer
begins where the prompt for it ends, and ends where a rendering of the same conversation with that one turn replaced
becomes equal again. So templates that trim, drop earlier reasoning or write calls in a form of their own are served.
"""

import re
from dataclasses import dataclass, field, replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation, Turn
from jebi.data.templates import CHAT, Answer, Rendered
from jebi.errors import ConfigError, DataError

_STAND_IN = "\U0010fffe"
"""Takes an answer's place in a second rendering: in no text, and nothing that trimming removes."""


@dataclass
class ChatTemplate:
    """A Jinja chat template, the tokenizer's own unless another is given."""

    tokenizer: PreTrainedTokenizerBase
    """Renders it, with its special tokens as variables."""
    jinja: str | None = None
    """The user's own; None takes the tokenizer's."""
    whole: bool = True
    """Chat templates write BOS themselves; transformers never adds one."""
    literals: str = field(init=False)
    """The template, and the special tokens that it names by variables."""
    _tail: str | None = field(init=False)
    """What ends a last answer, without white space behind: nothing where the template ends none, None where it refuses
    a plain question and answer, so that each row has to be asked."""
    _tokens: re.Pattern[str] = field(init=False)
    """Any of the tokenizer's added tokens."""

    def __post_init__(self) -> None:
        if self.jinja is None and not self.tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template, so conversations cannot be written: set data.template to a "
                "Jinja chat template (its text or a .jinja file), or take the model's instruct version."
            )
        own = self.jinja if self.jinja is not None else self.tokenizer.chat_template
        texts = list(own.values()) if isinstance(own, dict) else [str(own)]
        self.literals = "\0".join([*texts, *(str(token) for token in self.tokenizer.all_special_tokens)])
        added = sorted((str(t.content) for t in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._tokens = re.compile("|".join(re.escape(t) for t in added if not t.isspace()) or "(?!)")
        self._tail = None
        try:
            self._tail = self._written_tail((Turn("user", "?"),))
        except DataError:
            return

    @property
    def spec(self) -> str:
        """``chat``, or the user's text."""
        return CHAT if self.jinja is None else self.jinja

    def render(self, row: Conversation, learnt: tuple[int, ...] = ()) -> Rendered:
        """Write a row as ``apply_chat_template`` does and find these turns' answers."""
        self._require_known(row)
        text = self._write(row)
        answers = [self._find(row, text, turn) for turn in learnt]
        if row.turns[-1].role == "assistant" and not self._tail_of(row, len(row.turns) - 1):
            # Nothing would tell the model to stop.
            text += str(self.tokenizer.eos_token or "")
            answers = [replace(a, end=len(text)) if a.turn == len(row.turns) - 1 else a for a in answers]
        return Rendered(text, tuple(answers))

    def prompt(self, row: Conversation) -> str:
        """Write turns and what opens an answer."""
        self._require_known(row)
        return self._write(row, opens=True)

    def _find(self, row: Conversation, text: str, turn: int) -> Answer:
        stand_in = Turn("assistant", _STAND_IN)
        other = self._write(replace(row, turns=(*row.turns[:turn], stand_in, *row.turns[turn + 1 :])))
        before, found, after = other.partition(_STAND_IN)
        if not found:
            raise DataError(f"the chat template leaves out turn {turn}, an answer; it cannot be learnt.")
        if not text.endswith(after):
            raise DataError(
                f"the chat template writes what follows turn {turn} differently with another answer in its place, so "
                "the answer's end is not known: set data.learn: all, or another data.template."
            )
        return Answer(
            turn, self._start(row, text, turn, before), len(text) - len(after) + self._ending(row, turn, after)
        )

    def _ending(self, row: Conversation, turn: int, after: str) -> int:
        """How many characters of what follows an answer end its turn: what ends a last one, without white space behind.

        Some templates end the last turn in another way (gpt-oss), or put EOS behind all (Phi 3). An earlier turn's end
        is then the first token in what follows it, since this template does end turns.
        """
        tail = self._tail_of(row, turn)
        if not after.startswith(tail):
            tail = self._written_tail(row.turns[:turn], row)
        if after.startswith(tail):
            return len(tail)
        token = self._tokens.match(after.lstrip())
        if token is None:
            raise DataError(
                f"the chat template ends a last turn with {tail!r}, but turn {turn} in another way, so its end is not "
                "known: set data.learn: all, or another data.template."
            )
        return len(after) - len(after.lstrip()) + token.end()

    def _start(self, row: Conversation, text: str, turn: int, before: str) -> int:
        """Where the model takes over: behind the prompt of the turns before, where the row begins with that.

        Else the template wrote earlier turns differently there (Qwen 3 drops their reasoning), and it is behind what
        opens an answer in ``before``, the rendering up to the stand-in; at the latest where the renderings part.
        """
        parts = _common(text, before)
        try:
            history = replace(row, turns=row.turns[:turn])
            prompt = self._write(history, opens=True)
            if text.startswith(prompt):
                return len(prompt)
            opening = prompt[_common(prompt, self._write(history)) :]
        except DataError:  # of these turns alone, such as none, no prompt can be made
            return parts
        begins = before.rfind(opening) + len(opening) if opening and opening in before else parts
        return min(begins, parts)

    def _tail_of(self, row: Conversation, turn: int) -> str:
        return self._tail if self._tail is not None else self._written_tail(row.turns[:turn], row)

    def _written_tail(self, before: tuple[Turn, ...], row: Conversation | None = None) -> str:
        """What is written behind an answer that follows these turns as the last, without white space at the end."""
        last = (*before, Turn("assistant", _STAND_IN))
        written = self._write(Conversation(last) if row is None else replace(row, turns=last))
        return written.rpartition(_STAND_IN)[2].rstrip()

    def _write(self, row: Conversation, opens: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [turn.message() for turn in row.turns],
                    tools=list(row.tools) or None,
                    chat_template=self.jinja,
                    tokenize=False,
                    add_generation_prompt=opens,
                )
            )
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    def _require_known(self, row: Conversation) -> None:
        """`DataError` for what the template would leave out without a word."""
        held = {
            "tool calls": ("tool_calls", any(turn.tool_calls for turn in row.turns)),
            "reasoning": ("reasoning", any(turn.reasoning for turn in row.turns)),
            "tools": ("tools", bool(row.tools)),
        }
        for name, (word, there) in held.items():
            if there and word not in self.literals and not (name == "reasoning" and "thinking" in self.literals):
                raise DataError(f"it holds {name}, which the chat template does not write: set another data.template.")


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    for position, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return position
    return min(len(one), len(other))
