"""A formatter of the user's: a row, whatever its columns, to a text, to messages, or to the columns of a known format.

data.formatter: my_format.py:to_messages      a Python function of one row
data.formatter: "{{ title }}: {{ body }}{{ eos_token }}"      a Jinja text of one row's columns, ready as it stands
"""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from jebi.data.formats import at
from jebi.errors import ConfigError, DataError

Formatter = Callable[[dict[str, Any]], Any]


def load_formatter(spec: str, tokenizer: PreTrainedTokenizerBase) -> Formatter:
    """The function or the Jinja text that ``data.formatter`` names.

    Raises:
        ConfigError: there is none there.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _function(Path(path).expanduser(), name)
    if "{{" not in spec and "{%" not in spec:
        raise ConfigError(f"data.formatter '{spec}' must be file.py:function, or a Jinja text with {{{{ column }}}}.")
    try:
        template = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
            spec
        )
    except TemplateError as error:
        raise ConfigError(f"data.formatter is no Jinja: {error}.") from error
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return lambda row: template.render(tokens | row)


def apply_formatter(rows: Dataset | IterableDataset, formatter: Formatter) -> Any:
    """The rows as it makes them; what it makes is never taken from a cache, since a function may hide anything.

    Raises:
        DataError: it fails on a row or gives something else; the message names the row.
    """
    kinds: dict[str, str] = {}

    def change(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            made = _columns(formatter(dict(row)))
            _require_alike(made, kinds)
            return made
        except DataError as error:
            raise DataError(f"{at(number)}: {error}") from error
        except Exception as error:
            raise DataError(f"{at(number)}: data.formatter failed: {type(error).__name__}: {error}") from error

    columns = list(rows.column_names or next(iter(rows), {}))
    if isinstance(rows, IterableDataset):
        return rows.map(change, with_indices=True, remove_columns=columns)
    settings: dict[str, Any] = {"load_from_cache_file": False, "keep_in_memory": True, "desc": "Formatting"}
    return rows.map(change, with_indices=True, remove_columns=columns, **settings)


def _require_alike(made: dict[str, Any], kinds: dict[str, str]) -> None:
    """`DataError` unless a row has the columns and the kinds of values that ``kinds`` says; arrow would make texts."""
    if kinds and made.keys() != kinds.keys():
        raise DataError(
            f"data.formatter gives columns {', '.join(made)} where it gave {', '.join(kinds)} before: "
            "give the same for every row."
        )
    for name, value in made.items():
        kind = "number" if isinstance(value, int | float) else type(value).__name__
        if value is not None and kinds.get(name, "NoneType") not in ("NoneType", kind):
            raise DataError(f"data.formatter gives a {kind} in column '{name}' where it gave a {kinds[name]} before.")
        kinds[name] = kind if value is not None else kinds.get(name, kind)


def _function(path: Path, name: str) -> Formatter:
    if not path.is_file():
        raise ConfigError(f"data.formatter: there is no file '{path}'.")
    try:
        found = runpy.run_path(str(path)).get(name)
    except Exception as error:
        raise ConfigError(f"data.formatter: '{path}' cannot be run: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"data.formatter: '{path}' has no function '{name}'.")
    function: Formatter = found
    return function


def _columns(made: Any) -> dict[str, Any]:
    """What a formatter gave as columns; messages as JSON, so that Arrow does not even them out."""
    if isinstance(made, str):
        return {"text": made}
    if isinstance(made, list):
        return {"messages": json.dumps(made, ensure_ascii=False)}
    if isinstance(made, dict):
        return {
            name: json.dumps(value, ensure_ascii=False) if name in ("messages", "conversations", "tools") else value
            for name, value in made.items()
        }
    raise DataError(f"data.formatter must give a text, a list of messages or columns, not {made!r:.60}.")
