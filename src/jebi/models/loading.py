"""Put a checkpoint's tensors into a model one at a time, quantising as they arrive.

Beside the model no more than the tensor under way is in memory. Every mismatch is an error that names the tensor and
the file. Where tensors come from is `models.files`'; what the model is, `models.decoder`'s and `models.hf`'s.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from jebi.errors import WeightsError
from jebi.models.families import read_config
from jebi.models.files import ModelFiles, StoredTensor
from jebi.models.hf import JebiForCausalLM
from jebi.models.rope import read_rotary
from jebi.nn.linear import Linear
from jebi.quant.nf4 import NF4Weight

_HARMLESS = ("rotary_emb.inv_freq",)
"""Endings of names that old checkpoints carry and no model needs."""


def load_model(
    files: ModelFiles, config: PretrainedConfig, dtype: torch.dtype, device: torch.device, load_in_4bit: bool
) -> JebiForCausalLM:
    """Build the model of ``config`` and fill it from ``files``.

    Args:
        files: the checkpoint.
        config: its config, possibly with RoPE scaled since.
        dtype: compute dtype, and storage of everything that is not quantised.
        device: where the model is to live.
        load_in_4bit: store the layers' projections as NF4; embedding, norms and head stay in ``dtype``.

    Raises:
        ModelError: the family is not supported; raised before any weight is read.
        WeightsError: a tensor is missing, is one too many, has another shape, or its file is broken.
    """
    shape = read_config(config)
    model = JebiForCausalLM(config, shape, dtype, read_rotary(config, device))
    awaited = dict(model.named_parameters(remove_duplicate=False))
    if shape.tied:
        awaited.pop("lm_head.weight")
    total = len(awaited)
    for stored in _progress(files.tensors(), total):
        if stored.name.endswith(_HARMLESS) or (shape.tied and stored.name == "lm_head.weight"):
            continue
        _install(model, stored, awaited, (dtype, device), load_in_4bit)
    if awaited:
        raise WeightsError(
            f"'{files.path}' lacks {len(awaited)} of the {total} tensors its config calls for, "
            f"first '{min(awaited)}'. The file is incomplete or its config is another model's."
        )
    if shape.tied:
        embedding = model.model.embed_tokens.weight
        assert isinstance(embedding, nn.Parameter)
        model.lm_head.weight = embedding
    model.eval()
    return model


def _install(
    model: nn.Module,
    stored: StoredTensor,
    awaited: dict[str, nn.Parameter],
    place: tuple[torch.dtype, torch.device],
    quantise: bool,
) -> None:
    expected = awaited.pop(stored.name, None)
    if expected is None:
        raise WeightsError(f"'{stored.file}' holds tensor '{stored.name}', for which the model has no place.")
    if stored.shape != tuple(expected.shape):
        raise WeightsError(
            f"'{stored.file}': tensor '{stored.name}' has shape {list(stored.shape)}; "
            f"the config calls for {list(expected.shape)}."
        )
    dtype, device = place
    value = _read(stored).to(device)
    owner_name, _, leaf = stored.name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if quantise and leaf == "weight" and isinstance(owner, Linear) and owner_name != "lm_head":
        try:
            owner.store(NF4Weight.quantize(value.to(dtype)))
        except WeightsError as error:
            raise WeightsError(f"'{stored.file}': tensor '{stored.name}': {error}") from error
    else:
        setattr(owner, leaf, nn.Parameter(value.to(dtype), requires_grad=False))


def _read(stored: StoredTensor) -> Tensor:
    try:
        return stored.read()
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"'{stored.file}': tensor '{stored.name}' cannot be read: {error}") from error


def _progress(tensors: Iterable[StoredTensor], total: int) -> Iterable[StoredTensor]:
    """A bar on stderr, shown once loading has taken two seconds."""
    bar: Iterable[StoredTensor] = tqdm(tensors, total=total, desc="Loading", unit="tensor", file=sys.stderr, delay=2)
    return bar
