"""Put a checkpoint's tensors into a model one at a time, quantising as they arrive.

Beside the model no more than the weight under way is in memory, and on the way to a card `models.staging`'s buffers.
Every mismatch is an error that names the tensor and the file. Where tensors come from is `models.files`'; what the
model is, `models.decoder`'s and `models.hf`'s.
"""

import dataclasses
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from jebi.config import EmbeddingPlace, HeadPlace, Places, Storage, launched
from jebi.config.limits import WHOLE_LAYERS
from jebi.errors import OutOfMemoryError, WeightsError
from jebi.kernels.dequantize import PackedWeight
from jebi.models.device import free_bytes, reserve_in_pages
from jebi.models.families import read_config
from jebi.models.files import Folder, ModelFiles, StoredTensor
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import fitting, place, resolve
from jebi.models.prequantised import Scheme, joined, read_scheme
from jebi.models.rope import read_rotary
from jebi.models.shares import Shares, room_for
from jebi.models.staging import staged
from jebi.nn.host_weight import HostWeight, matrix
from jebi.nn.linear import Linear
from jebi.quant.footprint import divided_bytes, weight_bytes
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

logger = logging.getLogger(__name__)

_HARMLESS = ("rotary_emb.inv_freq",)
"""Endings of names that old checkpoints carry and no model needs."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip

_Form = Storage | Literal["as stored"]
"""How a weight is held; "as stored": as NF4 where it comes so, else dense."""


def _settled(places: Places, model: JebiForCausalLM, device: torch.device, needed: int) -> Places:
    """Places with nothing left open, by the room there is on a card for a model of so many bytes."""
    shape = model.model.shape
    if device.type == "cuda":
        table = shape.vocabulary * shape.layer.width * model.dtype.itemsize
        places = fitting(places, shape.tied, table, needed, free_bytes(device))
    return resolve(places, shape.tied, device)


def load_model(
    files: ModelFiles,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    storage: Storage,
    places: Places = Places(),  # noqa: B008  (frozen)
    mesh: DeviceMesh | None = None,
) -> JebiForCausalLM:
    """Build the model of ``config`` and fill it from ``files``.

    Args:
        files: the checkpoint.
        config: its config, possibly with RoPE scaled since. What it says of the checkpoint's quantisation is taken
            out of it: it is not the model's.
        dtype: compute dtype, and storage of everything that is not quantised.
        device: where the model is to live.
        storage: how the layers' projections are held: "nf4", "int8", or "dense" in ``dtype``. Norms are dense. A
            checkpoint that is NF4 already is held as it is, where "nf4" is asked for. With "masters" everything is
            float32 and trained, and cast to ``dtype`` where it is used.
        places: where embedding and head are, dense but for a head that is to be quantised. What is to lie in host
            memory is never on the card.
        mesh: the processes among which the layers are divided; None for none.

    Raises:
        ModelError: the family or the checkpoint's quantisation is not supported, or the places contradict each other;
            raised before any weight is read.
        WeightsError: a tensor is missing, is one too many, has another shape, or its file is broken.
        OutOfMemoryError: memory ran out on the way.
    """
    reserve_in_pages(device)
    shape = read_config(config)
    scheme = read_scheme(config)
    vars(config).pop("quantization_config", None)
    model = JebiForCausalLM(config, shape, dtype, read_rotary(config, device))
    at = _settled(places, model, device, _bytes(model, storage, mesh))
    tables = {"model.embed_tokens": at.embedding, "lm_head": at.embedding if shape.tied else at.head}
    awaited = dict(model.named_parameters(remove_duplicate=False))
    total = len(awaited) - shape.tied
    dense: _Form = "masters" if storage == "masters" else "dense"
    # Where a checkpoint in the form asked for has a dense projection, its makers had their reasons.
    form: _Form = "as stored" if scheme and scheme.as_stored and storage == "nf4" else storage
    shares = Shares(model, mesh, divided=scheme is None) if mesh is not None else None
    # What does not go to the card through staging's buffers: it stays on the host, or another process reads it.
    past = {f"{name}.weight" for name, where in tables.items() if where == "host"}
    past |= {name for name in awaited if shares is not None and not shares.reads(name)}
    for stored in _progress(_arriving(files, scheme, device, past), total):
        _check(stored, awaited.pop(stored.name, None), config)
        owner_name, _, leaf = stored.name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if leaf == "weight" and (where := tables.get(owner_name)) is not None:
            value = _read_table(stored, dtype, device, where, dense)
        elif shares is not None and not shares.reads(stored.name):
            value = room_for(stored.shape, dtype, device, form)
        else:
            projection = leaf == "weight" and isinstance(owner, Linear)
            value = _read(stored, dtype, device, form if projection else dense)
        if not isinstance(value, nn.Parameter):
            delattr(owner, leaf)
        setattr(owner, leaf, value)
        if shares is not None:
            shares.arrived(stored.name)
    own_head = shape.tied and awaited.pop("lm_head.weight", None) is None
    if awaited:
        raise WeightsError(
            f"'{files.path}' lacks {len(awaited)} of the {total} tensors its config calls for, "
            f"first '{min(awaited)}'. The file is incomplete or its config is another model's ({_sizes(config)})."
        )
    if shape.tied:
        _tie(model, own_head)
    if shares is not None:
        shares.finish()
    place(model, at)
    model.places = places
    model.source = files if scheme is None else None
    model.eval()
    return model


def _arriving(files: ModelFiles, scheme: Scheme | None, device: torch.device, past: set[str]) -> Iterable[StoredTensor]:
    """The checkpoint's tensors in the form the model knows them, on the way to a card but for those named ``past``."""
    tensors = (stored for stored in files.tensors() if not stored.name.endswith(_HARMLESS))
    if scheme is not None:
        return joined(tensors, scheme)
    if device.type != "cuda":
        return tensors
    return staged((dataclasses.replace(s, span=None) if s.name in past else s for s in tensors), device)


def _bytes(model: JebiForCausalLM, storage: Storage, mesh: DeviceMesh | None = None) -> int:
    """What this process's part of all weights takes on a card, and what making the largest of them takes beside."""
    shares = 1 if mesh is None else mesh.size()
    layers = [linear.in_features * linear.out_features for name, linear in model.linears() if name != "lm_head"]
    tables = (2 - model.model.shape.tied) * model.model.shape.vocabulary * model.model.shape.layer.width
    # The original beside its float32 copy and codes.
    making = max(layers) * (model.dtype.itemsize + 4 + 2)
    projections = sum(weight_bytes(storage, values, model.dtype.itemsize, shares) for values in layers)
    if shares > 1:
        # Layers that have not arrived wholly, and later those that are computed.
        each = len(layers) // model.config.num_hidden_layers
        making += WHOLE_LAYERS * sum(divided_bytes(storage, values, model.dtype.itemsize) for values in layers[:each])
    return projections + tables * (4 if storage == "masters" else model.dtype.itemsize) + making


def _tie(model: JebiForCausalLM, own_head: bool) -> None:
    """Make the embedding the head too, unless the checkpoint has a head of its own: transformers keeps it then."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert isinstance(head, nn.Parameter | HostWeight)
    if own_head and not torch.equal(matrix(head), matrix(embedding)):
        logger.warning(
            "the model's config has tie_word_embeddings=true, and its checkpoint a head that is not the embedding: "
            "they are not tied. tie_word_embeddings=false in config.json says the same."
        )
        model.config.tie_word_embeddings = False
        model.model.shape = dataclasses.replace(model.model.shape, tied=False)
        return
    model.lm_head.store(embedding)


@torch.no_grad()
def read_masters(model: JebiForCausalLM, folder: Path) -> None:
    """Copy a checkpoint that a training of all weights wrote into the model that it goes on with.

    Raises:
        WeightsError: it is incomplete, broken, or another model's.
    """
    targets = dict(model.named_parameters())
    for stored in Folder(folder).tensors():
        target = targets.pop(stored.name, None)
        _check(stored, target, model.config)
        assert target is not None
        value = _read(stored, torch.float32, target.device, "dense")
        assert isinstance(value, nn.Parameter)
        target.copy_(value)
    if targets:
        raise WeightsError(f"'{folder}' lacks tensor '{min(targets)}'; the checkpoint is incomplete.")


def _check(stored: StoredTensor, expected: nn.Parameter | None, config: PretrainedConfig) -> None:
    if expected is None:
        raise WeightsError(
            f"'{stored.file}' holds tensor '{stored.name}', for which the model has no place "
            f"(its config: {_sizes(config)})."
        )
    if stored.shape != tuple(expected.shape):
        raise WeightsError(
            f"'{stored.file}': tensor '{stored.name}' has shape {list(stored.shape)}; "
            f"the config calls for {list(expected.shape)} ({_sizes(config)})."
        )


def _sizes(config: PretrainedConfig) -> str:
    """The config's numbers that decide which tensors there are and their shapes, for messages."""
    found = [f"{name} {value}" for name in _SIZES if (value := getattr(config, name, None)) is not None]
    return ", ".join(found)


def _read(stored: StoredTensor, dtype: torch.dtype, device: torch.device, form: _Form) -> nn.Parameter | PackedWeight:
    """Read one tensor and bring it into the form it is held in."""
    dtype = torch.float32 if form == "masters" else dtype
    try:
        value = stored.read().to(device)
        if isinstance(value, NF4Weight):
            if form in ("nf4", "as stored"):
                return value
            value = value.dense(dtype)
        if value.dtype not in _FLOATS:
            raise WeightsError(f"it is of dtype {value.dtype}, and nothing in the config says how it is quantised")
        value = value.to(dtype)
        if form == "nf4":
            return NF4Weight.quantize(value)
        if form == "int8":
            return Int8Weight.quantize(value)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"memory ran out while '{stored.name}' was loaded: set load_in_4bit, or free memory; jebi plan says what "
            "the model takes."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"'{stored.file}': tensor '{stored.name}' cannot be used: {error}") from error
    return nn.Parameter(value, requires_grad=form == "masters")


def _read_table(
    stored: StoredTensor, dtype: torch.dtype, device: torch.device, where: EmbeddingPlace | HeadPlace, dense: _Form
) -> nn.Parameter | PackedWeight | HostWeight:
    """Read embedding or head to where it is to be."""
    if where == "host":
        value = _read(stored, dtype, torch.device("cpu"), "dense")
        assert isinstance(value, nn.Parameter)
        return HostWeight(value, device)
    return _read(stored, dtype, device, where if where in ("nf4", "int8") else dense)


def _progress(tensors: Iterable[StoredTensor], total: int) -> Iterable[StoredTensor]:
    """A bar on stderr, shown once loading has taken two seconds; of several processes the first one shows it."""
    if launched.rank() > 0:
        return tensors
    bar: Iterable[StoredTensor] = tqdm(tensors, total=total, desc="Loading", unit="tensor", file=sys.stderr, delay=2)
    return bar
