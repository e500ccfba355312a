"""Making a model ready to answer. Generation itself is transformers' ``generate`` over the model's cached path."""

from typing import Any

import psutil
from torch import Tensor

from jebi.models.device import free_bytes
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import place

_SHARE = 0.5


def prepare(model: JebiForCausalLM) -> JebiForCausalLM:
    """Turn off training and keep what each token reads in the form it is read.

    On a CPU with room for it that includes 4-bit weights, dequantised. Training again drops the copies. What a
    training moved off the card, embedding and head, comes back where there is room.
    """
    model.eval()
    model.config.use_cache = True
    model.model.unstack()
    _bring_back(model)
    linears = [linear for _, linear in model.linears()]
    needed = sum(m.in_features * m.out_features for m in linears) * model.dtype.itemsize
    stay = model.device.type == "cpu" and not model.model.sharded
    roomy = stay and needed < _SHARE * psutil.virtual_memory().available
    for linear in linears:
        linear.keep_for_decoding(dense=roomy)
    return model


def _bring_back(model: JebiForCausalLM) -> None:
    table = model.model.shape.vocabulary * model.model.shape.layer.width * model.dtype.itemsize
    if model.device.type != "cpu" and 2 * table < _SHARE * free_bytes(model.device):
        place(model, model.places)


def generate(model: JebiForCausalLM, **inputs: Any) -> Tensor:
    """Token ids (B, S + new) that transformers' ``generate`` makes of its ``inputs``."""
    # It types its model as a protocol with settable `device` and `dtype`, which no PreTrainedModel has.
    output = model.generate(**inputs)  # type: ignore[misc]
    assert isinstance(output, Tensor), "a plain result was asked for"
    return output
