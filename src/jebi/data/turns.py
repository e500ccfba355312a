"""Messages, however they are written, to `Turn`s: OpenAI's role/content, ShareGPT's from/value, calls, parts, weights.

Nothing is guessed: a role, a part or a call that is not known is a `DataError` that says what is.
"""

import json
from collections.abc import Mapping
from typing import Any

from jebi.data.conversation import Role, Turn
from jebi.errors import ConfigError, DataError

ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "claude", "answer"), "assistant"
    ),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
"""Names of roles that data sets use; case does not matter."""

CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose text is a call in JSON."""

_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_WEIGHT_KEYS = ("loss_weight", "weight")
_TRAINS = "train"
"""Axolotl's flag: whether the turn is learnt."""


def require_roles(roles: Mapping[Any, Any]) -> None:
    """`ConfigError` unless the user's own roles mean known ones."""
    for name, meant in roles.items():
        if not isinstance(name, str) or not isinstance(meant, str) or meant not in ROLES:
            known = ", ".join(dict.fromkeys(ROLES.values()))
            raise ConfigError(f"data.roles: {name!r} must be a text and mean one of {known}, not {meant!r}.")


def read_turns(messages: Any, roles: Mapping[str, str]) -> tuple[Turn, ...]:
    """The turns of a row.

    Args:
        messages: a list of messages, or the JSON of one.
        roles: roles of the user's own beside `ROLES`.

    Raises:
        DataError: there are none, or one cannot be read; the message does not name the row.
    """
    messages = read_json(messages, "the conversation") if isinstance(messages, str) else without_nulls(messages)
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError("the conversation is empty.")
    return tuple(_read_turn(message, number, roles) for number, message in enumerate(messages))


def read_tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """A row's tools as OpenAI describes functions, whether wrapped so or bare, as objects or as JSON."""
    tools = read_json(tools, "tools") if isinstance(tools, str) and tools.strip() else without_nulls(tools)
    if not tools:
        return ()
    listed = list(tools) if isinstance(tools, list | tuple) else [tools]
    for number, tool in enumerate(listed):
        if isinstance(tool, str):
            listed[number] = tool = read_json(tool, "a tool")
        if not isinstance(tool, dict) or not ("function" in tool or "name" in tool):
            raise DataError(f"a tool must be an object with a name, not {tool!r:.60}.")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in listed)


def read_json(text: str, what: str) -> Any:
    """The value that a text holds as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is no JSON: {error.msg} at {text[max(0, error.pos - 10) : error.pos + 20]!r}."
        ) from error


def without_nulls(value: Any) -> Any:
    """The value without members that are null: Arrow gives every object all the members that any of them has.

    What a row spells as JSON has only the members that were meant, and keeps its nulls.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(member) for member in value]
    return value


def _read_turn(message: Any, number: int, roles: Mapping[str, str]) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"turn {number} must be an object with role and content, not {message!r:.60}.")
    named = _first(message, _ROLE_KEYS)
    if not isinstance(named, str):
        raise DataError(f"turn {number} has no role ('role' or 'from').")
    content, reasoning, calls = _read_content(_first(message, _CONTENT_KEYS), number)
    if named.strip().lower() in CALLS:
        role: Role = "assistant"
        calls, content = [*calls, *_read_calls(content)], ""
    else:
        role = _role(named, number, roles)
    calls += [call for given in message.get("tool_calls") or () for call in _read_calls(given)]
    if not content and not calls and not reasoning and _first(message, _CONTENT_KEYS) is None:
        raise DataError(f"turn {number} ({named}) says nothing: it has neither content nor tool_calls.")
    if calls and role != "assistant":
        raise DataError(f"turn {number} is of role '{named}' and calls a tool; only the model does.")
    return Turn(
        role,
        content,
        reasoning=reasoning or str(_first(message, _REASONING_KEYS) or ""),
        tool_calls=tuple(calls),
        extra=tuple((name, str(message[name])) for name in ("name", "tool_call_id") if message.get(name)),
        weight=_read_weight(message, role, number),
    )


def _role(named: str, number: int, roles: Mapping[str, str]) -> Role:
    key = named.strip().lower()
    meant = {name.lower(): role for name, role in roles.items()}.get(key, key)
    if meant not in ROLES:
        raise DataError(
            f"turn {number} has role '{named}', which is not known. Known: {', '.join((*ROLES, *CALLS))}. "
            f"Say what it is with data.roles, such as {{{named}: user}}."
        )
    return ROLES[meant]


def _read_content(content: Any, number: int) -> tuple[str, str, list[dict[str, Any]]]:
    """Text, reasoning and calls of a content, which is a text or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", "", []
    if not isinstance(content, list | tuple):
        raise DataError(f"turn {number} has {content!r:.40} for content, which is no text.")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else "text"
        value = part if isinstance(part, str) else _first(part, ("text", "value", "thinking", "reasoning"))
        if kind == "tool_call":
            calls += _read_calls(value)
        elif kind not in ("text", "reasoning", "thinking") or not isinstance(value, str):
            raise DataError(f"turn {number} has a part of type '{kind}'; jebi trains on text, reasoning and tool_call.")
        elif kind == "text":
            texts.append(value)
        else:
            reasoning.append(value)
    return "".join(texts), "\n".join(reasoning), calls


def _read_calls(given: Any) -> list[dict[str, Any]]:
    """One call or several, in JSON or as objects, with arguments as objects."""
    if isinstance(given, str):
        given = read_json(given, "a tool call")
    made = []
    for call in given if isinstance(given, list | tuple) else [given]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"a tool call must be an object with name and arguments, not {call!r:.60}.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = read_json(arguments, "a call's arguments") if arguments.strip() else {}
        identity = {"id": call["id"]} if call.get("id") else {}
        made.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | identity)
    return made


def _read_weight(message: Mapping[str, Any], role: Role, number: int) -> float | None:
    weight = _first(message, _WEIGHT_KEYS)
    if weight is None and isinstance(message.get(_TRAINS), bool):
        weight = float(message[_TRAINS])
    if weight is None:
        return None
    value = read_weight(weight, f"turn {number}")
    if role != "assistant" and value:
        raise DataError(f"turn {number} has weight {weight}; only answers are weighed, so a {role}'s may be 0 alone.")
    return value


def read_weight(weight: Any, where: str) -> float:
    """A weight in the loss: a number of at least 0."""
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise DataError(f"{where} has weight {weight!r}; it must be a number of at least 0.")
    return value


def _first(message: Any, keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if message.get(key) is not None), None)
