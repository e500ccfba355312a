"""Keys and types of settings, checked: a mistake names the setting and what it may be."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from jebi.errors import ConfigError


def reject_unknown(values: dict[str, Any], known: set[str], prefix: str) -> None:
    """`ConfigError` for the first key that is not known, with the nearest that is."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean '{prefix}{near[0]}'?" if near else f" Known: {', '.join(sorted(known))}."
            raise ConfigError(f"setting '{prefix}{key}' is unknown.{hint}")


def check_type(hint: Any, value: Any, name: str) -> None:
    """`ConfigError` unless the value has the hinted type; a hint that is no class or union of classes passes."""
    if hint is not Any and all(isinstance(typing.get_origin(option) or option, type) for option in _options(hint)):
        typed(hint, value, name)


def check_fields(section: Any) -> None:
    """`ConfigError` unless every field of a section, a dataclass, has its type."""
    hints = typing.get_type_hints(type(section))
    for found in dataclasses.fields(section):
        typed(hints[found.name], getattr(section, found.name), found.name)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def typed(hint: Any, value: Any, name: str) -> Any:
    """``value`` if it has the hinted type; whole numbers serve as floats."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, typing.get_args(hint)))}, not {value!r}.")
        return value
    options = _options(hint)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name} must be {names}, not {value!r}.")
