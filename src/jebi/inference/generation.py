"""Making a model ready to answer. Which tokens are made, and how, is `decoding`'s and `engine`'s."""

import logging
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig

from jebi.errors import ConfigError
from jebi.inference.decoding import Decoding
from jebi.inference.engine import WARM_TOKENS, Engine
from jebi.models.device import free_bytes
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import place
from jebi.nn.nf4_product import NF4Product

logger = logging.getLogger(__name__)

_SHARE = 0.5
_LONG_S = 2.0
"""Seconds after which the user is told what took them."""


def prepare(model: JebiForCausalLM, rows: Sequence[int] = (1,)) -> JebiForCausalLM:
    """Turn off training and keep what each token reads in the form it is read.

    On a CPU with room for it that includes 4-bit weights, dequantised, and where there is a kernel for it the 4 bits
    themselves (`kernels.nf4_on_cpu`), which rounds to bfloat16: said where float32 was asked for. On a card steps of so
    many ``rows`` at once are captured, which is said where it takes long. Training again undoes it. What a training
    moved off the card, embedding and head, comes back where there is room.
    """
    if not isinstance(rows, Sequence) or not rows or any(not isinstance(n, int) or n < 1 for n in rows):
        raise ConfigError(f"rows must be numbers of prompts that are answered at once, such as (1, 8), not {rows!r}.")
    model.eval()
    model.config.use_cache = True
    model.model.unstack()
    _bring_back(model)
    linears = [linear for _, linear in model.linears()]
    needed = sum(m.in_features * m.out_features for m in linears) * model.dtype.itemsize
    # Layers that several processes share are gathered as modules are called, which the engine's steps do not do.
    shared = model.model.sharded
    roomy = model.device.type == "cpu" and not shared and needed < _SHARE * psutil.virtual_memory().available
    if not shared:
        # Whatever is not packed is kept as it is multiplied anyway.
        model.model.stack(keep=roomy, answering=True)
        for group in model.model.answering_groups():
            group.lend()
    for linear in linears:
        linear.keep_for_decoding(dense=roomy)
    if shared:
        return model
    if model.dtype == torch.float32 and any(
        isinstance(group.base, NF4Product) for group in model.model.answering_groups()
    ):
        logger.warning(
            "answers multiply the 4-bit weights in bfloat16, by bitsandbytes' kernel for this CPU; without "
            "for_inference they are multiplied in float32"
        )
    engine = Engine()
    model.decoding = Decoding(engine)
    if model.device.type == "cuda":
        model.model.lay_for_few_rows()
        began = time.perf_counter()
        engine.warm_up(model, getattr(model, "max_seq_length", WARM_TOKENS), rows)
        _answer_once(model, rows)
        if (seconds := time.perf_counter() - began) > _LONG_S:
            logger.warning(f"made ready to answer in {seconds:.1f} s")
    return model


def _answer_once(model: JebiForCausalLM, rows: Sequence[int]) -> None:
    """Answer a prompt of two tokens with the best tokens and with drawn ones; neither settings nor seeds are touched.

    torch loads each of its kernels at its first use, 15 to 20 ms; a first answer needs seven that the engine does not
    (over 16 bits on an H200 its first token came after 125 ms, and comes after 18).
    """
    # Whatever the weights are: scores that are no numbers would end a drawn answer, and on a card the process.
    short = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": 0, "remove_invalid_values": True}
    settings = [GenerationConfig(**short, do_sample=False)]
    if not torch.are_deterministic_algorithms_enabled():  # which forbid what top_p sums
        settings.append(GenerationConfig(**short, do_sample=True, temperature=0.7, top_p=0.9))
    given, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            for count, how in product(dict.fromkeys(rows), settings):
                ids_BS = torch.zeros(count, 2, dtype=torch.long, device=model.device)
                generate(model, input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS), generation_config=how)
    finally:
        model.generation_config = given


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
