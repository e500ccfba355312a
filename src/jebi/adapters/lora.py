"""Put an adapter on a loaded model, and take it off. The arithmetic is `nn.lora`'s, the files are `peft_files`'.

Everything else of the model is frozen already; ``bias`` and ``modules_to_save`` say what is trained beside it.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from jebi.adapters import loftq, pissa
from jebi.adapters.peft_files import write_adapter
from jebi.adapters.targets import resolve
from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError
from jebi.models.placement import place
from jebi.models.shell import JebiPreTrainedModel
from jebi.nn import dora
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Linear
from jebi.nn.lora import Lora
from jebi.nn.trained_copy import drop_copies, train_copy


class LoraAdapter:
    """What the model carries: the adapter's settings, and how to save it."""

    def __init__(self, config: LoraConfig):
        self.config = config

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter of ``model`` in PEFT's format."""
        assert isinstance(model, JebiPreTrainedModel)
        write_adapter(model, self.config, folder)


def attach(model: JebiPreTrainedModel, config: LoraConfig, fresh: bool = True) -> None:
    """Give every targeted projection an adapter.

    A fresh one is started as the settings say, and the model then computes what it did before, or with LoftQ what it
    would without 4 bits, nearly. Without ``fresh`` the tensors hold anything: a file is about to be read into them.

    Raises:
        AdapterError: the model has an adapter already.
        ConfigError: a target module does not exist in this model, or a setting does not fit it.
    """
    if model.adapter is not None:
        raise AdapterError("the model already has an adapter; load the base model again to start another.")
    if any(parameter.requires_grad for parameter in model.model.parameters()):
        raise ConfigError(
            "the model was loaded with full_finetuning=True and is trained as it is: drop one of the two."
        )
    if model.model.sharded and (config.use_dora or config.init_lora_weights not in (True, "gaussian")):
        raise ConfigError(
            "use_dora and starts made of the weights (pissa, loftq) need whole layers, which no process has under "
            "shard=True: drop one of the two."
        )
    model.model.unstack()
    config, targets = resolve(model, config)
    if config.modules_to_save:
        place(model, model.places)  # what an earlier training moved off the card may be trained now
    wholly = _trained_wholly(model, config.modules_to_save or [])
    model.adapter = LoraAdapter(config)
    try:
        for path, linear in targets.items():
            sizes = linear.in_features, linear.out_features, config.rank_of(path), config.scale_of(path)
            linear.lora = Lora(*sizes, config.lora_dropout, model.device).train(model.training)
        if fresh:
            _start(model, targets, config)
        else:
            _make_room(targets, config)
        _thaw_biases(model, targets, config.bias)
        for module in wholly:
            for leaf, _ in list(module.named_parameters(recurse=False)):
                train_copy(module, leaf)
    except BaseException:
        detach(model)
        raise


def detach(model: JebiPreTrainedModel) -> None:
    """Take the adapter off again; the model is the base model."""
    model.model.unstack()
    loftq.undo(model)
    for _, linear in model.linears():
        linear.lora = None
    drop_copies(model)
    model.adapter = None


def _start(model: JebiPreTrainedModel, targets: dict[str, Linear], config: LoraConfig) -> None:
    method = config.init_lora_weights
    generator = torch.Generator().manual_seed(config.random_state)
    for path, linear in targets.items():
        assert linear.lora is not None
        if config.pissa:
            pissa.start(path, linear, str(method), config.random_state)
        elif method == "gaussian":
            linear.lora.reset_gaussian(generator)
        elif method is True:
            linear.lora.reset(generator)
    if method == "loftq":
        assert config.loftq_config is not None
        loftq.start(model, targets, config.loftq_config["loftq_iter"])
    if config.use_dora:
        for linear in targets.values():
            assert linear.lora is not None
            dora.start(linear.lora, linear.dense())


def _make_room(targets: dict[str, Linear], config: LoraConfig) -> None:
    """Make the tensors that a started adapter would have beside A and B."""
    for linear in targets.values():
        lora = linear.lora
        assert lora is not None
        if config.pissa:
            lora.freeze_start(torch.zeros_like(lora.A_rK), torch.zeros_like(lora.B_Nr))
        if config.use_dora:
            lora.magnitude_N = nn.Parameter(torch.ones_like(lora.B_Nr[:, 0]))


def _thaw_biases(model: JebiPreTrainedModel, targets: dict[str, Linear], mode: str) -> None:
    """Make the chosen biases trainable, as float32 master copies like the adapter's matrices."""
    chosen = {"none": {}, "lora_only": targets, "all": dict(model.linears())}[mode]
    for linear in chosen.values():
        if linear.bias is not None:
            train_copy(linear, "bias")


def _trained_wholly(model: JebiPreTrainedModel, names: list[str]) -> list[nn.Module]:
    """The modules that ``modules_to_save`` means: as in PEFT, those whose paths end with one of the names."""
    modules: dict[str, nn.Module] = {}
    for name in names:
        found = {path: module for path, module in model.named_modules() if path.endswith(name)}
        if not found:
            raise ConfigError(f"modules_to_save: the model has no '{name}'; embed_tokens and lm_head are usual.")
        for path, module in found.items():
            if isinstance(getattr(module, "weight", None), HostWeight):
                raise ConfigError(
                    f"modules_to_save: '{path}' lies in host memory, and is trained on the card alone: load the model "
                    "without embedding='host' and head='host'."
                )
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                raise ConfigError(
                    f"modules_to_save: '{path}' has no weight that could be trained wholly; 4-bit ones need "
                    "load_in_4bit=False, a quantised head head='card'."
                )
        modules |= found
    return list(modules.values())
