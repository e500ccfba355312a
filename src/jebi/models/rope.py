"""Rotary positions as a config states them, and the config changed for rows longer than the model was trained on.

Frequencies are computed by transformers' own functions, so every kind of scaling means the same here. How tables are
made of them is `nn.rotary`.

Sources: linear arXiv:2306.15595; dynamic NTK and YaRN arXiv:2309.00071; longrope arXiv:2402.13753; llama3 is Llama
3.1's. Their keys in a config: transformers ``modeling_rope_utils.py``.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jebi.errors import ConfigError, ModelError
from jebi.models.families import head_dim
from jebi.nn.rotary import Rotary

GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""Kinds of layers by what they attend to, in the config's words."""


@dataclass(frozen=True)
class _Kind:
    """The keys of one kind of scaling."""

    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    from_length: bool = False
    """Whether it also needs ``original_max_position_embeddings``, which the config's length can give."""


_KINDS = {
    "default": _Kind(),
    "linear": _Kind(("factor",)),
    "dynamic": _Kind(("factor",)),
    "yarn": _Kind(
        ("factor",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        from_length=True,
    ),
    "longrope": _Kind(("short_factor", "long_factor"), ("factor", "attention_factor"), from_length=True),
    "llama3": _Kind(("factor", "low_freq_factor", "high_freq_factor"), from_length=True),
}
_LISTS = ("short_factor", "long_factor")
_ORIGINAL = "original_max_position_embeddings"


def read_rotary(config: PretrainedConfig, device: torch.device) -> dict[str, Rotary]:
    """The rotary positions of each kind of layer; one object under both keys where the model has one RoPE.

    Raises:
        ModelError: the config names a kind of scaling that is not known, or its numbers make no frequencies.
    """
    config = copy.deepcopy(config)  # read again for longer rows, and by then it may have been changed
    try:
        if not _nested(config):
            rotary = _read(config, None, device)
            return {GLOBAL: rotary, LOCAL: rotary}
        return {layers: _read(config, layers, device) for layers in (GLOBAL, LOCAL)}
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(
            f"the model's config has rope_parameters={config.rope_parameters}, which make no RoPE: {error!r}"
        ) from error


def scale_context(config: PretrainedConfig, max_seq_length: int, rope_scaling: dict[str, Any] | None) -> str | None:
    """Change ``config`` for rows of ``max_seq_length`` tokens; say what was done where nobody asked for it.

    Without ``rope_scaling`` nothing changes within the model's own length, and beyond it the scaling that the model
    has is carried on. ``rope_scaling``, in transformers' keys, takes the place of the model's own; of that the base
    and the rotated share of a head stay. In a model with two RoPEs only that of its global layers is changed: local
    ones look no further than their window.

    Raises:
        ConfigError: ``rope_scaling`` is not complete or not possible.
        ModelError: rows of this length cannot be served by the model's own scaling.
    """
    if not getattr(config, "rope_parameters", None):
        return None  # a model without RoPE is none of jebi's, and is refused by its family when it is loaded
    parameters = dict(_parameters(config))
    trained = int(config.max_position_embeddings)
    if rope_scaling is not None:
        chosen = _checked(rope_scaling, config)
        kept = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
        _put(config, kept | chosen, max_seq_length)
        return _shortfall(chosen, trained, max_seq_length)
    if max_seq_length <= trained:
        return None
    done = _carry_on(parameters, trained, max_seq_length)
    _put(config, parameters, max_seq_length)
    return f"max_seq_length {max_seq_length} exceeds the model's {trained}: {done}"


def _nested(config: PretrainedConfig) -> bool:
    return isinstance(config.rope_parameters.get(GLOBAL), dict)


def _parameters(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the global layers."""
    found: dict[str, Any] = config.rope_parameters[GLOBAL] if _nested(config) else config.rope_parameters
    return found


def _put(config: PretrainedConfig, parameters: dict[str, Any], max_seq_length: int) -> None:
    config.rope_parameters = config.rope_parameters | {GLOBAL: parameters} if _nested(config) else parameters
    if _ORIGINAL in parameters and hasattr(config, _ORIGINAL):
        setattr(config, _ORIGINAL, parameters[_ORIGINAL])  # Phi-3's, which transformers puts before the parameters'
    # The dynamic kind scales by a row's length over this one, which therefore stays the trained one.
    if parameters.get("rope_type") != "dynamic":
        config.max_position_embeddings = max(int(config.max_position_embeddings), max_seq_length)


def _read(config: PretrainedConfig, layers: str | None, device: torch.device) -> Rotary:
    parameters = config.rope_parameters if layers is None else config.rope_parameters[layers]
    kind = parameters.get("rope_type", "default")
    if kind not in _KINDS:
        raise ModelError(f"rope_type '{kind}' is not known. Known: {', '.join(_KINDS)}.")
    size = _turned(config, parameters)
    if size % 2 or not 0 < size <= head_dim(config):
        raise ModelError(
            f"the model's config has RoPE turn {size} of a head's {head_dim(config)}; an even part is needed."
        )
    if kind == "default":
        steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
        return Rotary(1.0 / (float(parameters["rope_theta"]) ** (steps / size)))
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, device, layer_type=layers)
    inv_freq, scaling = inv_freq.float(), float(scaling)
    if kind == "dynamic":
        beyond = partial(_inv_freq_at, config, layers, device)
        return Rotary(inv_freq, scaling, int(config.max_position_embeddings), beyond)
    if kind == "longrope":
        # Read after the function above has filled it in.
        reach = int((config.rope_parameters if layers is None else config.rope_parameters[layers])[_ORIGINAL])
        long = _inv_freq_at(config, layers, device, reach + 1)
        # Of transformers' models only this one begins again when a row outgrows its short factors.
        restarts = config.model_type == "phi3"
        return Rotary(inv_freq, scaling, reach, partial(_whatever_length, long), restarts)
    return Rotary(inv_freq, scaling)


def _turned(config: PretrainedConfig, parameters: dict[str, Any]) -> int:
    """How much of a head is turned."""
    return int(head_dim(config) * (parameters.get("partial_rotary_factor") or 1.0))


def _inv_freq_at(config: PretrainedConfig, layers: str | None, device: torch.device, length: int) -> Tensor:
    """Inverse frequencies of a row of ``length`` tokens."""
    kind = (config.rope_parameters if layers is None else config.rope_parameters[layers])["rope_type"]
    # A tensor, as transformers hands it in when it serves a row: with a Python number the powers are taken in float64.
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, device, seq_len=torch.tensor(length), layer_type=layers)
    return inv_freq.float()


def _whatever_length(inv_freq: Tensor, length: int) -> Tensor:
    return inv_freq


def _carry_on(parameters: dict[str, Any], trained: int, max_seq_length: int) -> str:
    """Make the model's own scaling reach ``max_seq_length``; say how."""
    kind = parameters.get("rope_type", "default")
    excess = max_seq_length / trained
    factor = float(parameters.get("factor") or 1.0)
    if kind in ("default", "linear"):
        parameters |= {"rope_type": "linear", "factor": excess * factor}
        return f"RoPE scaled linearly by {excess * factor:g}"
    if kind == "yarn":
        original = int(parameters.get(_ORIGINAL) or trained)
        factor = float(parameters.get("factor") or trained / original)
        raised = max(factor, max_seq_length / original)
        parameters |= {"factor": raised, _ORIGINAL: original}
        if raised == factor:
            return f"its YaRN reaches that far, by a factor of {factor:g}"
        return f"YaRN's factor raised from {factor:g} to {raised:g}"
    if kind == "llama3":
        parameters |= {"factor": excess * factor, _ORIGINAL: int(parameters.get(_ORIGINAL) or trained)}
        return f"the factor of its llama3 RoPE raised from {factor:g} to {excess * factor:g}"
    if kind == "dynamic":
        return "nothing to scale, its dynamic RoPE follows each row's length"
    raise ModelError(
        f"max_seq_length={max_seq_length} exceeds the model's {trained}, which its RoPE ('{kind}') does not go beyond. "
        f"Set max_seq_length to {trained} or less, or choose a scaling yourself, such as "
        'rope_scaling={"rope_type": "yarn", "factor": 4.0}.'
    )


def _shortfall(chosen: dict[str, Any], trained: int, max_seq_length: int) -> str | None:
    """A notice where the scaling that was asked for does not reach the longest row."""
    if chosen["rope_type"] not in ("linear", "yarn", "llama3"):
        return None
    reach = int(chosen["factor"] * chosen.get(_ORIGINAL, trained))
    if reach >= max_seq_length:
        return None
    return (
        f"rope_scaling's factor {chosen['factor']:g} reaches {reach} tokens, and max_seq_length is {max_seq_length}: "
        "longer rows stand further than the model was trained for"
    )


def _checked(rope_scaling: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The scaling asked for, complete; `ConfigError` for anything in it that cannot be."""
    if not isinstance(rope_scaling, dict):
        raise ConfigError(f"rope_scaling must be a dictionary, such as {_example('yarn')}, not {rope_scaling!r}.")
    chosen = dict(rope_scaling)
    old = chosen.pop("type", None)
    name = chosen.setdefault("rope_type", old)
    if old not in (None, name):
        raise ConfigError(f"rope_scaling: type '{old}' contradicts rope_type '{name}': drop one of the two.")
    if not isinstance(name, str) or name not in _KINDS:
        raise ConfigError(f"rope_scaling: rope_type {name!r} is not known; use one of {', '.join(_KINDS)}.")
    kind = _KINDS[name]
    known = {"rope_type", "rope_theta", *kind.needs, *kind.takes} | ({_ORIGINAL} if kind.from_length else set())
    for key in chosen:
        if key not in known:
            raise ConfigError(f"rope_scaling: '{key}' is no setting of {name}; its are {', '.join(sorted(known))}.")
    for key in kind.needs:
        if chosen.get(key) is None:
            raise ConfigError(f"rope_scaling: {name} needs '{key}'; add it, such as {_example(name)}.")
    if kind.from_length and chosen.get(_ORIGINAL) is None:
        stated = _parameters(config).get(_ORIGINAL) or getattr(config, _ORIGINAL, None)
        chosen[_ORIGINAL] = int(stated or config.max_position_embeddings)
    _check_values(chosen, config)
    return chosen


def _check_values(chosen: dict[str, Any], config: PretrainedConfig) -> None:
    for key, value in chosen.items():
        if key in _LISTS:
            size = _turned(config, _parameters(config)) // 2
            if not isinstance(value, list | tuple) or len(value) != size or not all(map(_positive, value)):
                raise ConfigError(f"rope_scaling: {key} must be a list of {size} numbers above 0, one a frequency.")
            chosen[key] = list(value)
        elif key == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"rope_scaling: truncate must be true or false, not {value!r}.")
        elif key != "rope_type" and value is not None and not _positive(value):
            raise ConfigError(f"rope_scaling: {key} must be a number above 0, not {value!r}.")
    if (factor := chosen.get("factor")) is not None and factor < 1:
        raise ConfigError(f"rope_scaling: factor must be at least 1, not {factor:g}; 2 doubles the model's length.")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if None not in (chosen.get(low), chosen.get(high)) and chosen[low] >= chosen[high]:
            raise ConfigError(f"rope_scaling: {low} must be below {high}, not {chosen[low]:g} and {chosen[high]:g}.")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _example(name: str) -> str:
    needs = {"factor": "4.0", "low_freq_factor": "1.0", "high_freq_factor": "4.0"}
    settings = [f'"{key}": {needs.get(key, "[...]")}' for key in _KINDS[name].needs]
    return f'rope_scaling={{"rope_type": "{name}", {", ".join(settings)}}}'
