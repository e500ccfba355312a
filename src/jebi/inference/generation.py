"""Making a model ready to answer. Generation itself is transformers' ``generate`` over the model's cached path."""

from typing import Any

import psutil
from torch import Tensor

from jebi.models.hf import JebiForCausalLM

_SHARE = 0.5


def prepare(model: JebiForCausalLM) -> JebiForCausalLM:
    """Turn off training and, on a CPU with room for it, keep 4-bit weights dequantised: each token reads them all."""
    model.eval()
    model.config.use_cache = True
    if model.device.type == "cpu":
        linears = [linear for _, linear in model.linears()]
        needed = sum(m.in_features * m.out_features for m in linears) * model.dtype.itemsize
        if needed < _SHARE * psutil.virtual_memory().available:
            for linear in linears:
                linear.keep_dense(True)
    return model


def generate(model: JebiForCausalLM, **inputs: Any) -> Tensor:
    """Token ids (B, S + new) that transformers' ``generate`` makes of its ``inputs``."""
    # It types its model as a protocol with settable `device` and `dtype`, which no PreTrainedModel has.
    output = model.generate(**inputs)  # type: ignore[misc]
    assert isinstance(output, Tensor), "a plain result was asked for"
    return output
