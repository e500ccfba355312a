"""Settings from YAML and from ``--set``, every key and type checked. What settings there are is `settings`'."""

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from jebi.config.checking import reject_unknown, typed
from jebi.config.settings import DataConfig, LoraConfig, ModelConfig, RunConfig
from jebi.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``2e-4`` for a text; here it is the number that it is everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def read_run(path: Path, settings: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply ``section.key=value`` settings over it.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        document = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config '{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"config '{path}' must hold sections: model, lora, data, train.")
    return run_from_dict(apply_settings(document, settings or []))


def apply_settings(document: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """The nested dictionaries with ``section.key=value`` settings put into them."""
    for setting in settings:
        _apply(document, setting)
    return document


def run_from_dict(document: dict[str, Any]) -> RunConfig:
    """Build a run from nested dictionaries, as YAML yields them."""
    known = {"model": ModelConfig, "lora": LoraConfig, "data": DataConfig}
    reject_unknown(document, {*known, "train"}, "")
    sections = {name: _section(cls, document.get(name) or {}, name) for name, cls in known.items()}
    if sections["model"].full_finetuning and sections["lora"] != LoraConfig():
        raise ConfigError("model.full_finetuning trains every weight and no adapter: drop it or section 'lora'.")
    train = document.get("train") or {}
    if not isinstance(train, dict):
        raise ConfigError("section 'train' must hold settings, one a line.")
    return RunConfig(**sections, train=dict(train))


def _apply(document: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set '{setting}' must be section.key=value, such as --set lora.r=32.")
    target = document.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"--set '{setting}': section '{section}' holds no settings.")
    try:
        target[name] = _load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set '{setting}': the value is not YAML; put it in quotes.") from error


def _section(cls: type, values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"section '{name}' must hold settings, one a line.")
    fields = {f.name for f in dataclasses.fields(cls)}
    reject_unknown(values, fields, f"{name}.")
    hints = typing.get_type_hints(cls)
    checked = {key: typed(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    return cls(**checked)
