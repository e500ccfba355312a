"""adapter_config.json, both ways: PEFT's settings of an adapter and jebi's.

Source of the format: peft ``tuners/lora/config.py``. What PEFT has no word for is noted in the header of the weights
file, where PEFT passes over it: how an adapter was started that PEFT reads as a plain LoRA.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_NOTE, _ROPE_NOTE = "jebi", "jebi_rope"
"""Keys of notes in the weights file's header: how the adapter was started, and the RoPE it was trained with."""

_UNSUPPORTED = {
    "target_parameters": "adapted parameters",
    "trainable_token_indices": "trained tokens",
    "ensure_weight_tying": "trained copies that stay tied",
    "layer_replication": "replicated layers",
    "lora_bias": "biased adapters",
    "fan_in_fan_out": "transposed weights",
    "megatron_config": "Megatron layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Settings of an adapter_config.json that change what it computes and that jebi does not have."""

_SCORE_HEADS = ["classifier", "score"]
"""What PEFT trains whole in a SEQ_CLS adapter, whichever of the two a model has."""

_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base model as it is; others take something out of its weights."""

_SAME = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
"""Settings that are called the same and mean the same in both."""


def to_peft(config: LoraConfig, base: str | None) -> dict[str, Any]:
    """The settings as adapter_config.json holds them, ``base`` being the name of the base model."""
    document: dict[str, Any] = {name: getattr(config, name) for name in _SAME}
    if config.pissa:
        _double_ranks(document)
    document["lora_alpha"] = _whole(document["lora_alpha"])
    document["alpha_pattern"] = {name: _whole(alpha) for name, alpha in document["alpha_pattern"].items()}
    return document | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def as_scorer(document: dict[str, Any]) -> dict[str, Any]:
    """What differs in ``document`` for a model with a score head, which PEFT trains whole."""
    wholly = document["modules_to_save"] or []
    return {"task_type": "SEQ_CLS", "modules_to_save": [*wholly, *_SCORE_HEADS]}


def header_note(config: LoraConfig, model_config: PretrainedConfig) -> dict[str, str]:
    """What the header of the weights file says beside PEFT's settings."""
    notes = {_ROPE_NOTE: json.dumps(model_config.rope_parameters, sort_keys=True)}
    if not config.pissa and config.init_lora_weights != "loftq":
        return notes
    names = ("init_lora_weights", "loftq_config", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
    return notes | {_NOTE: json.dumps({name: getattr(config, name) for name in names})}


def other_rope(folder: Path, model_config: PretrainedConfig) -> str | None:
    """A notice where an adapter notes another RoPE than the model's, as ``max_seq_length`` scales it."""
    noted, present = _header(folder).get(_ROPE_NOTE), json.dumps(model_config.rope_parameters, sort_keys=True)
    if noted in (None, present):
        return None
    return (
        f"adapter '{folder}' was trained with RoPE {noted}, and the model has {present}: load it with the "
        "max_seq_length and rope_scaling of the training."
    )


def read_config(folder: Path) -> LoraConfig:
    """The settings of an adapter folder.

    Raises:
        AdapterError: no adapter there, or one of a kind that jebi does not have.
    """
    document = read_document(folder)
    if document.get("peft_type") != "LORA":
        raise AdapterError(f"adapter '{folder}' is of type {document.get('peft_type')}; jebi reads LORA.")
    for key, meaning in _UNSUPPORTED.items():
        if document.get(key):
            raise AdapterError(f"adapter '{folder}' uses {meaning} ({key}), which jebi does not have.")
    start = document.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS and start != "pissa":
        raise AdapterError(
            f"adapter '{folder}' has init_lora_weights={start!r}, which changes the base model's weights too. In PEFT, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain LoRA of it."
        )
    targets = document.get("target_modules")
    if not isinstance(targets, list | str):
        raise AdapterError(f"adapter '{folder}': target_modules must be names or an expression, not {targets!r}.")
    settings = {name: document[name] for name in _SAME if document.get(name) is not None}
    if document.get("task_type") == "SEQ_CLS":
        # The score head belongs to the model, and is among the tensors awaited.
        wholly = [name for name in settings.get("modules_to_save", []) if name not in _SCORE_HEADS]
        settings["modules_to_save"] = wholly or None
    if start == "pissa":
        settings["init_lora_weights"] = start
    if missing := {"r", "lora_alpha"} - settings.keys():
        raise AdapterError(f"'{folder / CONFIG_FILE}' lacks {missing.pop()}.")
    try:
        return LoraConfig(**settings | _header_note(folder))
    except (TypeError, ConfigError) as error:
        raise AdapterError(f"'{folder / CONFIG_FILE}': {error}") from error


def takes_from_base(folder: Path) -> bool:
    """Whether an adapter of PEFT's counts on a base without the adapter's start, which its file does not hold."""
    return read_document(folder).get("init_lora_weights") == "pissa"


def names_base(folder: Path) -> str | None:
    """The base model's name that an adapter folder notes, if it notes one."""
    name = read_document(folder).get("base_model_name_or_path")
    return str(name) if name else None


def base_of(folder: Path) -> str:
    """The same, needed.

    Raises:
        ConfigError: the folder notes none.
    """
    name = names_base(folder)
    if name is None:
        raise ConfigError(f"adapter '{folder}' does not name its base model; load that first.")
    return name


def read_document(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds.

    Raises:
        AdapterError: it is missing or no JSON.
    """
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"adapter '{folder}' has no {CONFIG_FILE}; name a folder that a training wrote.") from error
    except ValueError as error:
        raise AdapterError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise AdapterError(f"'{path}' must hold an object of settings.")
    return document


def _header_note(folder: Path) -> dict[str, Any]:
    """The note that `header_note` made; a file that cannot be read is told when its tensors are."""
    return dict(json.loads(_header(folder).get(_NOTE, "{}")))


def _header(folder: Path) -> dict[str, str]:
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            return weights.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _double_ranks(document: dict[str, Any]) -> None:
    """Count the frozen halves, and raise every alpha so that the scales stay."""
    factor = 2**0.5 if document["use_rslora"] else 2
    document["r"] *= 2
    document["lora_alpha"] *= factor
    document["rank_pattern"] = {name: 2 * rank for name, rank in document["rank_pattern"].items()}
    document["alpha_pattern"] = {name: factor * alpha for name, alpha in document["alpha_pattern"].items()}


def _whole(number: float) -> float:
    """An int where it is one, as PEFT's field has it."""
    return int(number) if float(number).is_integer() else number
