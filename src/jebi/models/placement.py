"""Where the embedding's table and the head are: on the card, in host memory, or, the head, quantised.

Loading puts them there at once (`models.loading`); a training's plan may move them later. What it costs to use them
from there is `nn.embedding`'s and `nn.slices`'.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from jebi.config import EmbeddingPlace, HeadPlace, Places
from jebi.errors import ModelError
from jebi.kernels.dequantize import PackedWeight
from jebi.nn.host_weight import HostWeight, matrix
from jebi.nn.linear import Linear
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel

_QUANTISED = {"int8": Int8Weight, "nf4": NF4Weight}


def resolve(places: Places, tied: bool, device: torch.device) -> Places:
    """`Places.settled` for a device."""
    return places.settled(tied, device.type != "cpu")


def fitting(places: Places, tied: bool, table: int, needed: int, free: int) -> Places:
    """Places for loading: tables that are left open lie in host memory where a card has no room for everything.

    A training's plan may bring them back.

    Args:
        places: what was asked for.
        tied: whether embedding and head are one table.
        table: bytes of one table.
        needed: bytes of all weights, tables included, and of what loading takes beside them.
        free: bytes on the card.
    """
    if needed > free and places.embedding == "auto" and not (tied and places.head != "auto"):
        places, needed = dataclasses.replace(places, embedding="host"), needed - table
        if tied:
            return dataclasses.replace(places, head="host")
    if needed > free and places.head == "auto" and not tied:
        places = dataclasses.replace(places, head="host")
    return places


def placed(model: "JebiPreTrainedModel") -> Places:
    """Where they are now; a model without a head has it on the card."""
    embedding, head = model.model.embed_tokens.weight, getattr(model.get_output_embeddings(), "weight", None)
    names: dict[type, HeadPlace] = {HostWeight: "host", Int8Weight: "int8", NF4Weight: "nf4"}
    return Places("host" if isinstance(embedding, HostWeight) else "card", names.get(type(head), "card"))


def movable(model: "JebiPreTrainedModel") -> Places:
    """What the user asked for, with "auto" where a training's plan may still choose: of tables that are not trained."""
    places, shape = model.places, model.model.shape
    modules = model.model.embed_tokens, model.get_output_embeddings()
    trained = [any(p.requires_grad for p in module.parameters()) if module is not None else True for module in modules]
    if shape.tied and any(trained):
        trained = [True, True]
    embedding: EmbeddingPlace = "card" if trained[0] and places.embedding == "auto" else places.embedding
    head: HeadPlace = "card" if trained[1] and places.head == "auto" else places.head
    return Places(embedding, head)


@torch.no_grad()
def place(model: "JebiPreTrainedModel", places: Places) -> None:
    """Put embedding and head there; what the model computes stays the same, but for a head that is quantised.

    Raises:
        ModelError: a table is trained, which it is on the card alone; a quantised head is to be dense again; or
            `resolve` finds a contradiction.
    """
    embedding, module = model.model.embed_tokens, model.get_output_embeddings()
    head = module if isinstance(module, Linear) else None
    tied = head is not None and head.weight is embedding.weight
    at = resolve(places, tied, model.device)
    if at == placed(model):
        return
    if head is not None and at.head in _QUANTISED:
        if tied:
            model.config.tie_word_embeddings = False
            model.model.shape = dataclasses.replace(model.model.shape, tied=False)
        head.store(_quantised(head.weight, at.head))
    table = _moved(embedding.weight, at.embedding, model.device)
    if head is not None and head.weight is embedding.weight:
        head.store(table)
    elif head is not None and isinstance(head.weight, nn.Parameter | HostWeight):
        head.store(_moved(head.weight, at.head, model.device))
    elif head is not None and at.head not in _QUANTISED:
        raise ModelError(f"head='{at.head}': the head is quantised, and its digits are gone; load the model again.")
    embedding.store(table)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _moved(weight: nn.Parameter | HostWeight, to: str, device: torch.device) -> nn.Parameter | HostWeight:
    if to != "host":
        return nn.Parameter(weight.dense(), requires_grad=False) if isinstance(weight, HostWeight) else weight
    if isinstance(weight, HostWeight):
        return weight
    if weight.requires_grad:
        raise ModelError("embedding and head are trained on the card alone: leave their places 'auto'.")
    return HostWeight(weight, device)


def _quantised(weight: nn.Parameter | PackedWeight | HostWeight, to: str) -> PackedWeight:
    if isinstance(weight, PackedWeight):
        if not isinstance(weight, _QUANTISED[to]):
            raise ModelError(f"head='{to}': the head is quantised otherwise already; load the model again.")
        return weight
    if matrix(weight).requires_grad:
        raise ModelError(f"head='{to}': a head that is trained is not quantised; leave it 'auto'.")
    dense_VD = weight.dense() if isinstance(weight, HostWeight) else weight
    return NF4Weight.quantize(dense_VD) if to == "nf4" else Int8Weight.quantize(dense_VD)
