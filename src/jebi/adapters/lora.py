"""Put LoRA on a loaded model. The arithmetic is `nn.lora`'s, the files are `peft_files`'.

Everything else of the model is frozen already; ``bias`` decides which biases are thawed.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from jebi.adapters.peft_files import write_adapter
from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError
from jebi.models.shell import JebiPreTrainedModel
from jebi.nn.linear import Linear
from jebi.nn.lora import Lora


class LoraAdapter:
    """What the model carries: the adapter's settings, and how to save it."""

    def __init__(self, config: LoraConfig):
        self.config = config

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter of ``model`` in PEFT's format."""
        assert isinstance(model, JebiPreTrainedModel)
        write_adapter(model, self.config, folder)


def attach(model: JebiPreTrainedModel, config: LoraConfig) -> None:
    """Give every targeted projection a fresh adapter; the model then computes what it did before.

    Raises:
        AdapterError: the model has an adapter already.
        ConfigError: a target module does not exist in this model.
    """
    if model.adapter is not None:
        raise AdapterError("the model already has an adapter; load the base model again to start another.")
    targets = _targets(model, config.target_modules)
    generator = torch.Generator().manual_seed(config.random_state)
    for linear in targets:
        lora = Lora(linear.in_features, linear.out_features, config.r, config.scale, config.lora_dropout, model.device)
        lora.reset(generator)
        linear.lora = lora.train(model.training)
    _thaw_biases(model, targets, config.bias)
    model.adapter = LoraAdapter(config)


def detach(model: JebiPreTrainedModel) -> None:
    """Take the adapter off again; the model is the base model."""
    for _, linear in model.linears():
        linear.lora = None
        if linear.base_bias is not None:
            linear.bias = nn.Parameter(linear.base_bias, requires_grad=False)
            linear.base_bias = None
    model.adapter = None


def _targets(model: JebiPreTrainedModel, names: list[str]) -> list[Linear]:
    present: dict[str, list[Linear]] = {}
    for path, linear in model.linears():
        if path != "lm_head":
            present.setdefault(path.rpartition(".")[2], []).append(linear)
    for name in names:
        if name not in present:
            raise ConfigError(f"target_modules: the model has no '{name}'. It has: {', '.join(present)}.")
    return [linear for name, linears in present.items() if name in names for linear in linears]


def _thaw_biases(model: JebiPreTrainedModel, targets: list[Linear], mode: str) -> None:
    """Make the chosen biases trainable, as float32 master copies like the adapter's matrices."""
    chosen = [] if mode == "none" else targets if mode == "lora_only" else [m for _, m in model.linears()]
    for linear in chosen:
        if linear.bias is not None:
            linear.base_bias = linear.bias.detach()
            linear.bias = nn.Parameter(linear.bias.detach().clone().float(), requires_grad=True)
