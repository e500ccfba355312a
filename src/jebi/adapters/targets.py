"""Which projections of a model get an adapter, by PEFT's rules (``tuners_utils.check_target_module_exists`` there).

Names are matched against the ends of paths; a text is a regular expression of whole paths; ``all-linear`` is every
projection but the head. What follows from that is written back as names, so that PEFT adapts the same modules.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jebi.config import ALL_LINEAR, LoraConfig
from jebi.errors import ConfigError

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel
    from jebi.nn.linear import Linear

logger = logging.getLogger(__name__)

_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Maps that some checkpoints hold as one (Phi-3)."""

_HEAD = "lm_head"


def resolve(model: "JebiPreTrainedModel", config: LoraConfig) -> tuple[LoraConfig, dict[str, "Linear"]]:
    """The settings with names that this model has, and the projections to adapt, by path.

    Raises:
        ConfigError: a name or pattern fits nothing, or nothing is left.
    """
    maps = dict(model.linears())
    config, paths = resolve_paths(maps, config, len(model.model.layers))
    return config, {path: maps[path] for path in paths}


def resolve_paths(paths: Iterable[str], config: LoraConfig, layers: int) -> tuple[LoraConfig, list[str]]:
    """The same of a model's paths alone, which has so many layers."""
    maps = [path for path in paths if path != _HEAD]
    names = _names(config.target_modules, maps)
    _require_layers(config.layers_to_transform, layers)
    config = dataclasses.replace(config, target_modules=names)
    chosen = [path for path in maps if _named(names, path) and _in_layers(config, path) and not _left_out(config, path)]
    if not chosen:
        raise ConfigError(
            "no projection is left to adapt: look at layers_to_transform, exclude_modules and modules_to_save."
        )
    # Maps of one name together: the order in which a seed's numbers are drawn.
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in maps))
    chosen = sorted(chosen, key=lambda path: kinds.index(path.rpartition(".")[2]))
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in chosen):
                raise ConfigError(f"{setting}: '{pattern}' is the end of no adapted projection's path.")
    return config, chosen


def _names(asked: list[str] | str, maps: list[str]) -> list[str] | str:
    """The names asked for as this model has them; a regular expression stays one."""
    present = list(dict.fromkeys(path.rpartition(".")[2] for path in maps))
    if asked == ALL_LINEAR:
        return present
    if isinstance(asked, str):
        if re.fullmatch(asked, _HEAD):
            raise ConfigError(
                f"target_modules '{asked}' also means {_HEAD}, which takes no adapter: name it in modules_to_save."
            )
        if not any(re.fullmatch(asked, path) for path in maps):
            raise ConfigError(
                f"target_modules '{asked}' is a regular expression of whole paths, and none fits; such as "
                f"'{maps[0]}'. Names are given as a list."
            )
        return asked
    names: list[str] = []
    for name in asked:
        if not any(_named([name], path) for path in maps):
            if _FUSED.get(name) not in present:
                raise ConfigError(f"target_modules: the model has no '{name}'. It has: {', '.join(present)}.")
            name = _FUSED[name]
        if name not in names:
            names.append(name)
    if fused := [name for name in names if name not in asked]:
        logger.warning(f"target_modules: the model holds some of these maps as one, so {', '.join(fused)} are adapted.")
    return names


def _require_layers(asked: list[int] | int | None, count: int) -> None:
    for layer in [asked] if isinstance(asked, int) else asked or ():
        if layer not in range(count):
            raise ConfigError(f"layers_to_transform: the model has no layer {layer!r}; its {count} count from 0.")


def _named(names: list[str] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _left_out(config: LoraConfig, path: str) -> bool:
    """Excluded, or trained wholly."""
    if config.exclude_modules and _named(config.exclude_modules, path):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save or ())


def _in_layers(config: LoraConfig, path: str) -> bool:
    asked = config.layers_to_transform
    if asked is None or asked == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path):
            return int(match[1]) in ([asked] if isinstance(asked, int) else asked)
    return False
