"""The names of section ``train``, which are the fields of a dataclass of `training.arguments`.

The values are checked there, where transformers is loaded. Here that is not waited for: who only reads a run, as
`jebi plan` does, takes the names from the dataclasses' source, 0.03 s where the imports take seconds.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jebi.config.checking import reject_unknown
from jebi.errors import ConfigError

_ELSEWHERE = {
    "packing": "data.packing",
    "long": "data.long",
    "overlap": "data.overlap",
    "allow": "data.allow",
    "dataset_text_field": "data.text_field",
    "max_seq_length": "model.max_seq_length",
}
"""Fields of `SFTConfig` that a config file sets in another section."""

_SOURCES = (("transformers", "training_args.py", "TrainingArguments"), ("jebi", "training/arguments.py", "SFTConfig"))
"""Package, file in it and dataclass."""


def require_names(train: dict[str, Any], known: set[str]) -> None:
    """`ConfigError` for the first name of section ``train`` that is not known, or belongs into another section."""
    for name, place in _ELSEWHERE.items():
        if name in train:
            raise ConfigError(f"train.{name}: set {place} instead.")
    reject_unknown(train, known, "train.")


def names() -> set[str]:
    """All fields of `SFTConfig`, without importing it."""
    return {name for source in _SOURCES for name in _fields(*source)}


def _fields(package: str, file: str, name: str) -> Iterator[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
