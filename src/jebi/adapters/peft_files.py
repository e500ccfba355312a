"""An adapter's folder in PEFT's format, both ways: adapter_model.safetensors, and how the files come to be there.

Source of the format: peft ``utils/save_and_load.py``. The settings file is `peft_config`'s.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jebi.adapters import loftq
from jebi.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE, as_scorer, header_note, takes_from_base, to_peft
from jebi.config import LoraConfig
from jebi.errors import AdapterError
from jebi.models.reward import JebiForSequenceClassification
from jebi.models.shell import JebiPreTrainedModel
from jebi.nn.host_weight import HostWeight, matrix
from jebi.nn.linear import Linear
from jebi.nn.trained_copy import copies

_PREFIX = "base_model.model."

_DOUBLED = (".modules_to_save.weight", ".original_module.weight")
"""Endings of what PEFT writes once more, under its wrappers' names, of trained tables of a resized vocabulary."""


def write_adapter(model: JebiPreTrainedModel, config: LoraConfig, folder: Path) -> None:
    """Write the model's adapter into ``folder``, each file under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = _frozen_halves(model)
    tensors = {
        name: torch.cat([value, halves[name]], _stacked(name)) if name in halves else value
        for name, value in adapter_tensors(model).items()
    }
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    if model.is_resized:
        # Copies, since tied tables share memory, which a file cannot.
        tables = {name: value.detach().to("cpu", copy=True) for name, value in _tables(model).items()}
        tensors = tables | tensors
    weights, settings, shift = folder / WEIGHTS_FILE, folder / CONFIG_FILE, folder / loftq.SHIFT_FILE
    shifted = loftq.shift_tensors(model)
    document = to_peft(config, model.config.name_or_path)
    if isinstance(model, JebiForSequenceClassification):
        document |= as_scorer(document)
    try:
        save_file(tensors, _partial(weights), metadata={"format": "pt"} | header_note(config, model.config))
        _partial(settings).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if shifted:
            save_file(shifted, _partial(shift), metadata={"format": "pt"})
            _partial(shift).replace(shift)
        _partial(weights).replace(weights)
        _partial(settings).replace(settings)
    finally:
        for path in (weights, settings, shift):
            _partial(path).unlink(missing_ok=True)
    if shifted:
        loftq.warn_of_shift(folder)
    else:
        shift.unlink(missing_ok=True)  # an older adapter's, which this one does not stand on


def stored_vocabulary(folder: Path) -> int | None:
    """Rows of the embedding or head that an adapter's file holds; None where it holds neither, or is not there."""
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            held = set(weights.keys())
            for name in (f"{_PREFIX}model.embed_tokens.weight", f"{_PREFIX}lm_head.weight"):
                if name in held:
                    return int(weights.get_slice(name).get_shape()[0])
    except (SafetensorError, OSError):
        return None
    return None


def read_weights(model: JebiPreTrainedModel, folder: Path) -> None:
    """Copy an adapter's tensors into the adapter that ``model`` has already, and make the base it stands on.

    Raises:
        AdapterError: a tensor is missing, is one too many, or has another shape: the adapter is another model's.
    """
    path = folder / WEIGHTS_FILE
    try:
        stored = {name: value for name, value in load_file(path).items() if not name.endswith(_DOUBLED)}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"'{path}' is missing or broken: {error}") from error
    tables, head = _tables(model), f"{_PREFIX}lm_head.weight"
    awaited = {name: table for name, table in tables.items() if name in stored} | adapter_tensors(model)
    if head in stored and head not in awaited and model.get_output_embeddings() is not None:
        raise AdapterError(f"adapter '{folder}' brings a head, and the model's is quantised: load it with head='card'.")
    # PEFT's own files of PiSSA hold the trained half alone; the frozen one was made from the base.
    halves = {} if takes_from_base(folder) else _frozen_halves(model)
    if stored.keys() != awaited.keys():
        strange = sorted(stored.keys() ^ awaited.keys())[0]
        raise AdapterError(
            f"adapter '{folder}' was made for another model: tensor '{strange}' is "
            f"{'not in the model' if strange in stored else 'not in the adapter'}."
        )
    for name, target in awaited.items():
        shape = list(target.shape)
        if name in halves:
            shape[_stacked(name)] *= 2
        if list(stored[name].shape) != shape:
            raise AdapterError(
                f"adapter '{folder}' was made for another model: tensor '{name}' has shape "
                f"{list(stored[name].shape)}, the model needs {shape}."
            )
    loftq.make_base_for(model, folder)
    model.drop_kept()
    with torch.no_grad():
        for name, target in awaited.items():
            if name in halves:
                trained, frozen = stored[name].chunk(2, _stacked(name))
                target.copy_(trained)
                halves[name].copy_(frozen)
            else:
                target.copy_(stored[name])


def adapter_tensors(model: JebiPreTrainedModel) -> dict[str, Tensor]:
    """Everything trained, under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for path, linear in model.linears():
        if linear.lora is not None:
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = linear.lora.A_rK
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = linear.lora.B_Nr
            if linear.lora.magnitude_N is not None:
                tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = linear.lora.magnitude_N
    for path, module, leaf in copies(model):
        # PEFT wraps an adapted module, so what is trained of it beside the adapter moves one level down.
        wrapped = ".base_layer" if isinstance(module, Linear) and module.lora is not None else ""
        tensors[f"{_PREFIX}{path}{wrapped}.{leaf}"] = getattr(module, leaf)
    if isinstance(model, JebiForSequenceClassification):
        tensors[f"{_PREFIX}score.weight"] = model.score.weight
    return tensors


def _frozen_halves(model: JebiPreTrainedModel) -> dict[str, Tensor]:
    """What is stored behind the trained matrices of the same names (`Lora.freeze_start`)."""
    tensors: dict[str, Tensor] = {}
    for path, linear in model.linears():
        if linear.lora is not None and linear.lora.frozen_A_rK is not None:
            assert linear.lora.frozen_B_Nr is not None
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = linear.lora.frozen_A_rK
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = linear.lora.frozen_B_Nr
    return tensors


def _tables(model: JebiPreTrainedModel) -> dict[str, Tensor]:
    """Embedding and head, which a file carries, untrained too, when the vocabulary is no longer the base's.

    A quantised head is not among them: its vocabulary is the base's.
    """
    named: dict[str, nn.Module] = {"model.embed_tokens": model.get_input_embeddings()}
    if (head := model.get_output_embeddings()) is not None:
        named["lm_head"] = head
    weights = {f"{_PREFIX}{path}.weight": module.weight for path, module in named.items()}
    return {name: matrix(weight) for name, weight in weights.items() if isinstance(weight, nn.Parameter | HostWeight)}


def _stacked(name: str) -> int:
    """The dimension along which the halves of a matrix lie: its rank."""
    return 0 if name.endswith(".lora_A.weight") else 1


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
