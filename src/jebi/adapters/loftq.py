"""LoftQ: a 4-bit base and an adapter that together stand near the original weights (arXiv:2310.08659, algorithm 1).

One round leaves the base as it was quantised and starts the adapter at the best low-rank part of the error. Every
further round quantises what the adapter of the round before left of the original, so the base is another one then;
the adapter that was taken out of it is kept as ``Lora.stand_in``: it takes the trained one's place while that is
switched off, and is saved beside it, from which the same base is made again.

Shapes: N outputs, K inputs, r rank.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jebi.adapters.low_rank import best_factors, require_rank
from jebi.adapters.peft_config import read_config
from jebi.errors import AdapterError, ConfigError
from jebi.models.shell import JebiPreTrainedModel
from jebi.nn.linear import Linear
from jebi.nn.lora import Lora
from jebi.quant.nf4 import NF4Weight

logger = logging.getLogger(__name__)

SHIFT_FILE = "jebi_loftq.safetensors"
"""What was taken out of the base before it was quantised."""


@torch.no_grad()
def start(model: JebiPreTrainedModel, targets: Mapping[str, Linear], rounds: int) -> None:
    """Start the adapters of ``targets``, one projection after the other.

    Raises:
        ConfigError: the base is not 4-bit, its checkpoint does not hold the original weights, or a rank is too high.
    """
    for path, linear in targets.items():
        require_rank(path, linear, "loftq")
    for path, original_NK in originals(model, targets):
        linear, lora = targets[path], targets[path].lora
        assert lora is not None
        assert isinstance(linear.weight, NF4Weight)
        stand_in = None
        for number in range(rounds):
            if number:
                stand_in = _copy(lora)
                linear.store(_quantised_without(stand_in, original_NK, linear.weight.dtype))
            error_NK = original_NK - linear.weight.dense(torch.float32)
            A_rK, B_Nr = best_factors(error_NK, lora.A_rK.shape[0])
            lora.A_rK.copy_(A_rK * lora.scale**-0.5)
            lora.B_Nr.copy_(B_Nr * lora.scale**-0.5)
        lora.stand_in = stand_in


def originals(model: JebiPreTrainedModel, targets: Mapping[str, Linear]) -> Iterator[tuple[str, Tensor]]:
    """The original weights (N, K) of 4-bit projections, float32 on the model's device, one at a time."""
    if not all(isinstance(linear.weight, NF4Weight) for linear in targets.values()):
        raise ConfigError("LoftQ corrects what 4 bits lose: load the model with load_in_4bit=True, or leave LoftQ.")
    if model.source is None:
        raise ConfigError(
            "LoftQ reads the original weights again, and this model's checkpoint came quantised: load the original."
        )
    left = dict(targets)
    for stored in model.source.tensors():
        path, _, leaf = stored.name.rpartition(".")
        if leaf != "weight" or path not in left:
            continue
        del left[path]
        original_NK = stored.read()
        assert isinstance(original_NK, Tensor), "a checkpoint that came quantised is no source"
        yield path, original_NK.to(model.device, torch.float32)
    assert not left, "a model holds every weight of its checkpoint"


def stand_ins(model: JebiPreTrainedModel) -> dict[str, Lora]:
    """What was taken out of the base, by path."""
    return {
        path: linear.lora.stand_in
        for path, linear in model.linears()
        if linear.lora is not None and linear.lora.stand_in is not None
    }


def shift_tensors(model: JebiPreTrainedModel) -> dict[str, Tensor]:
    """The same as `SHIFT_FILE` holds it; empty where the base is as it was loaded."""
    tensors: dict[str, Tensor] = {}
    for path, lora in stand_ins(model).items():
        tensors |= {f"{path}.lora_A": lora.A_rK.detach().cpu(), f"{path}.lora_B": lora.B_Nr.detach().cpu()}
    return tensors


def make_base_for(model: JebiPreTrainedModel, folder: Path) -> None:
    """Give the model the base that the adapter in ``folder`` was trained on, where LoftQ started it.

    Raises:
        AdapterError: that base was 4-bit and the model's is not, or it cannot be made again.
    """
    settings = read_config(folder).loftq_config
    if settings is None and not stand_ins(model):
        return
    adapted = {path: linear for path, linear in model.linears() if linear.lora is not None}
    if not all(isinstance(linear.weight, NF4Weight) for linear in adapted.values()):
        raise AdapterError(
            f"adapter '{folder}' was started with LoftQ and corrects what 4 bits lose: load its base with "
            "load_in_4bit=True."
        )
    if settings is not None and settings["loftq_iter"] > 1:
        _read_shift(model, adapted, folder / SHIFT_FILE)


@torch.no_grad()
def _read_shift(model: JebiPreTrainedModel, adapted: dict[str, Linear], path: Path) -> None:
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"'{path}' is missing or broken, and several rounds of LoftQ need it to make their base: {error}"
        ) from error
    if stored.keys() != {f"{name}.{part}" for name in adapted for part in ("lora_A", "lora_B")}:
        raise AdapterError(f"'{path}' was made for another model: it names other projections.")
    held = shift_tensors(model)
    if held.keys() == stored.keys() and all(torch.equal(held[name], value) for name, value in stored.items()):
        return
    for name, original_NK in originals(model, adapted):
        linear, lora = adapted[name], adapted[name].lora
        assert lora is not None
        assert isinstance(linear.weight, NF4Weight)
        stand_in = _copy(lora)
        stand_in.A_rK.copy_(stored[f"{name}.lora_A"])
        stand_in.B_Nr.copy_(stored[f"{name}.lora_B"])
        lora.stand_in = stand_in
        linear.store(_quantised_without(stand_in, original_NK, linear.weight.dtype))


def warn_of_shift(folder: Path) -> None:
    """Say what other programs need to know of an adapter that does not stand on the ordinary 4-bit base."""
    logger.warning(
        f"'{folder}': several rounds of LoftQ changed the 4-bit base. jebi makes it again from {SHIFT_FILE} and the "
        "original checkpoint; PEFT would put this adapter on the unchanged base, which it does not fit: write the "
        "changed one for it with model.save_base(folder). loftq_iter=1 leaves the base as it is."
    )


@torch.no_grad()
def undo(model: JebiPreTrainedModel) -> None:
    """Quantise the original weights again where the base was made without a part of them."""
    shifted = stand_ins(model)
    if not shifted:
        return
    linears = {path: linear for path, linear in model.linears() if path in shifted}
    for path, original_NK in originals(model, linears):
        weight = linears[path].weight
        assert isinstance(weight, NF4Weight)
        linears[path].store(NF4Weight.quantize(original_NK.to(weight.dtype)))


def _copy(lora: Lora) -> Lora:
    """A frozen adapter with the same matrices, scale and device."""
    rank, inputs = lora.A_rK.shape
    copy = Lora(inputs, lora.B_Nr.shape[0], rank, lora.scale, 0.0, lora.A_rK.device).requires_grad_(False)
    copy.A_rK.copy_(lora.A_rK)
    copy.B_Nr.copy_(lora.B_Nr)
    return copy


def _quantised_without(lora: Lora, original_NK: Tensor, dtype: torch.dtype) -> NF4Weight:
    """``NF4(W - scale B A)``. The product is summed in float64, so that every device makes the same base of it."""
    product_NK = (lora.B_Nr.double() * lora.scale) @ lora.A_rK.double()
    return NF4Weight.quantize((original_NK - product_NK.float()).to(dtype))
