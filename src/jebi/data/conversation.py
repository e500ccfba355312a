"""The one form that every row of questions and answers takes before a template writes it: turns, and the tools at hand.

Formats make it (`data.formats`), templates write it (`data.templates`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Role
    """Who spoke: an instruction that stands over all, the one who asks, the model, or a tool that was called."""
    content: str
    """What was said."""
    input: str = ""
    """An Alpaca question's further context, which Alpaca templates put in a place of its own."""
    reasoning: str = ""
    """What the model thought before it answered."""
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Calls the model made, as ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``."""
    extra: tuple[tuple[str, str], ...] = ()
    """Further texts of a message that some templates read: ``name`` and ``tool_call_id``."""
    weight: float | None = None
    """How much an answer counts in the loss; None where the row does not say."""
    given: bool = False
    """Whether an answer belongs to the prompt, so that it is not learnt where answers alone are."""

    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = f"{self.content}\n{self.input}" if self.input else self.content
        message: dict[str, Any] = {"role": self.role, "content": content} | dict(self.extra)
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True)
class Conversation:
    """A row."""

    turns: tuple[Turn, ...]
    """In the order they were spoken; never empty."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the model may call, as OpenAI describes functions."""
    weight: float = 1.0
    """How much the row counts in the loss."""

    @property
    def answers(self) -> list[int]:
        """Which turns are the model's."""
        return [number for number, turn in enumerate(self.turns) if turn.role == "assistant"]

    @property
    def last_answer(self) -> str:
        """What the model said last; empty where it said nothing."""
        return next((turn.content for turn in reversed(self.turns) if turn.role == "assistant"), "")

    @property
    def prompt(self) -> "Conversation":
        """The turns before the last answer, which is to be given anew."""
        last = self.answers[-1] if self.answers else len(self.turns)
        return replace(self, turns=self.turns[:last])

    def map_texts(self, change: Callable[[str, Role], str]) -> "Conversation":
        """The same with every text that came with the row changed; tools count as the user's."""
        turns = tuple(
            replace(
                turn,
                content=change(turn.content, turn.role),
                input=change(turn.input, turn.role),
                reasoning=change(turn.reasoning, turn.role),
                tool_calls=tuple(_changed(turn.tool_calls, change, turn.role)),
                extra=tuple((name, change(text, turn.role)) for name, text in turn.extra),
            )
            for turn in self.turns
        )
        return replace(self, turns=turns, tools=tuple(_changed(self.tools, change, "user")))


def question(instruction: str, input: str = "") -> Conversation:
    """A question alone, for a prompt."""
    return Conversation((Turn("user", instruction, input),))


def _changed(value: Any, change: Callable[[str, Role], str], role: Role) -> Any:
    """The value with every text in it changed, names of an object's members too."""
    if isinstance(value, str):
        return change(value, role)
    if isinstance(value, dict):
        return {_changed(key, change, role): _changed(member, change, role) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(member, change, role) for member in value]
    return value
