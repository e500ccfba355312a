"""Adapter files in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

Source of the format: peft ``utils/save_and_load.py`` and ``tuners/lora/config.py``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError
from jebi.models.reward import JebiForSequenceClassification
from jebi.models.shell import JebiPreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."

_UNSUPPORTED = {
    "use_dora": "DoRA",
    "rank_pattern": "per-module ranks",
    "alpha_pattern": "per-module alphas",
    "modules_to_save": "wholly trained modules",
    "layers_to_transform": "adapters on chosen layers",
    "exclude_modules": "excluded modules",
    "target_parameters": "adapted parameters",
    "trainable_token_indices": "trained tokens",
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


def write_adapter(model: JebiPreTrainedModel, config: LoraConfig, folder: Path) -> None:
    """Write the model's adapter into ``folder``, each file under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in adapter_tensors(model).items()}
    weights, settings = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    save_file(tensors, _partial(weights), metadata={"format": "pt"})
    document = _peft_config(config, model.config.name_or_path) | _task(model)
    _partial(settings).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _partial(weights).replace(weights)
    _partial(settings).replace(settings)


def read_config(folder: Path) -> LoraConfig:
    """The settings of an adapter folder.

    Raises:
        AdapterError: no adapter there, or one of a kind that jebi does not have.
    """
    document = _document(folder)
    if document.get("peft_type") != "LORA":
        raise AdapterError(f"adapter '{folder}' is of type {document.get('peft_type')}; jebi reads LORA.")
    if document.get("task_type") == "SEQ_CLS" and set(document.get("modules_to_save") or ()) <= set(_SCORE_HEADS):
        document["modules_to_save"] = None  # the score head, which is among the tensors awaited
    for key, meaning in _UNSUPPORTED.items():
        if document.get(key):
            raise AdapterError(f"adapter '{folder}' uses {meaning} ({key}), which jebi does not have.")
    start = document.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterError(
            f"adapter '{folder}' has init_lora_weights={start!r}, which changes the base model's weights too. In PEFT, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) writes a plain LoRA of it."
        )
    targets = document.get("target_modules")
    if not isinstance(targets, list):
        raise AdapterError(f"adapter '{folder}': target_modules must be a list of names, not {targets!r}.")
    try:
        return LoraConfig(
            r=document["r"],
            lora_alpha=document["lora_alpha"],
            lora_dropout=document.get("lora_dropout", 0.0),
            target_modules=targets,
            bias=document.get("bias", "none"),
            use_rslora=document.get("use_rslora", False),
        )
    except (KeyError, ConfigError) as error:
        raise AdapterError(f"'{folder / CONFIG_FILE}': {error}") from error


def names_base(folder: Path) -> str | None:
    """The base model's name that an adapter folder notes, if it notes one."""
    name = _document(folder).get("base_model_name_or_path")
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


def _document(folder: Path) -> dict[str, Any]:
    """What adapter_config.json holds."""
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


def read_weights(model: JebiPreTrainedModel, folder: Path) -> None:
    """Copy an adapter's tensors into the adapter that ``model`` has already.

    Raises:
        AdapterError: a tensor is missing, is one too many, or has another shape: the adapter is another model's.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"'{path}' is missing or broken: {error}") from error
    awaited = adapter_tensors(model)
    if stored.keys() != awaited.keys():
        strange = sorted(stored.keys() ^ awaited.keys())[0]
        raise AdapterError(
            f"adapter '{folder}' was made for another model: tensor '{strange}' is "
            f"{'not in the model' if strange in stored else 'not in the adapter'}."
        )
    for name, target in awaited.items():
        if stored[name].shape != target.shape:
            raise AdapterError(
                f"adapter '{folder}' was made for another model: tensor '{name}' has shape "
                f"{list(stored[name].shape)}, the model needs {list(target.shape)}."
            )
    model.drop_kept()
    with torch.no_grad():
        for name, target in awaited.items():
            target.copy_(stored[name])


def adapter_tensors(model: JebiPreTrainedModel) -> dict[str, Tensor]:
    """Everything trained, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, linear in model.linears():
        if linear.lora is not None:
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = linear.lora.A_rK
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = linear.lora.B_Nr
        if isinstance(linear.bias, nn.Parameter) and linear.bias.requires_grad:
            # PEFT wraps an adapted module, so its bias moves one level down.
            wrapped = ".base_layer" if linear.lora is not None else ""
            tensors[f"{_PREFIX}{path}{wrapped}.bias"] = linear.bias
    if isinstance(model, JebiForSequenceClassification):
        tensors[f"{_PREFIX}score.weight"] = model.score.weight
    return tensors


def _peft_config(config: LoraConfig, base: str | None) -> dict[str, Any]:
    alpha = int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _task(model: JebiPreTrainedModel) -> dict[str, Any]:
    """What PEFT calls the head, and which of its parts are trained whole."""
    if isinstance(model, JebiForSequenceClassification):
        return {"task_type": "SEQ_CLS", "modules_to_save": _SCORE_HEADS}
    return {"task_type": "CAUSAL_LM", "modules_to_save": None}


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
