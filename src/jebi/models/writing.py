"""Write a whole model as a Hugging Face checkpoint: config.json and safetensors, sharded when large.

A 4-bit model becomes a bitsandbytes checkpoint, its bytes as they are. Adapters and tokenizers are written by others.
"""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from jebi.errors import ConfigError, ModelError
from jebi.nn.host_weight import HostWeight
from jebi.nn.linear import Linear
from jebi.nn.trained_copy import originals_in_place
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight, to_bitsandbytes

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel

SHARD_SIZE = "5GB"
"""Largest file that is written, unless another size is asked for; a tensor is never divided."""

_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def write_checkpoint(
    model: "JebiPreTrainedModel",
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    shard_size: int | str = SHARD_SIZE,
) -> None:
    """Write config, generation config and weights into ``folder``.

    The weights are the model's in its compute dtype, or those given, as they are. ``shard_size``: see `write_weights`.

    Raises:
        ConfigError: ``shard_size`` is no size.
        ModelError: the model's weights are held in 8 bits, or this process has a part of them alone.
    """
    if model.model.sharded:
        raise ModelError("a process holds a part of this model: load it without shard=True to write it whole.")
    if weights is None:
        weights = _held(model)
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    packed: dict[str, NF4Weight] = {}
    for name, linear in model.linears():
        if linear is model.get_output_embeddings():
            continue
        if isinstance(linear.weight, Int8Weight):
            raise ModelError(
                "a model held in 8 bits is not saved, as other libraries do not know its blocks: load it with "
                "load_in_4bit=False to write 16 bits, or with load_in_4bit=True to write bitsandbytes' 4."
            )
        if isinstance(linear.weight, NF4Weight):
            packed[name] = linear.weight
            tensors |= to_bitsandbytes(linear.weight, f"{name}.weight")
    write_weights(tensors, folder, shard_size)
    config = model.config
    if packed:
        config = copy.deepcopy(config)
        dense = [name for name, _ in model.linears() if name not in packed]
        config.quantization_config = _quantization(packed, dense, config.dtype)
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _held(model: "JebiPreTrainedModel") -> dict[str, Tensor]:
    """Everything that is not 4-bit, in the compute dtype; a quantised head is written dense, as readers expect one."""
    held = {name: value.to(model.dtype) for name, value in model.named_parameters()}
    embedding, head = model.model.embed_tokens.weight, model.get_output_embeddings()
    if isinstance(embedding, HostWeight):
        held["model.embed_tokens.weight"] = embedding.weight_NK
    if isinstance(head, Linear) and not isinstance(head.weight, nn.Parameter) and head.weight is not embedding:
        held[_HEAD] = head.dense()
    return held


def write_base(model: "JebiPreTrainedModel", folder: Path) -> None:
    """Write the model without its adapter, 4-bit weights in bitsandbytes' format.

    That is what an adapter stands on where the checkpoint is not: after several rounds of LoftQ, or with a vocabulary
    that was resized.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with originals_in_place(model):
        held = {name: value for name, value in _held(model).items() if ".lora." not in name}
    write_checkpoint(model, folder, held)


def write_weights(tensors: dict[str, Tensor], folder: Path, shard_size: int | str = SHARD_SIZE) -> None:
    """Write ``tensors`` as safetensors, with an index where they take several files; all of them or none.

    Weight files that an earlier, differently divided checkpoint left in ``folder`` are removed: readers would mix them.

    Args:
        tensors: by name.
        folder: is there.
        shard_size: largest file, in bytes or as a text such as "2GB"; a larger tensor has a file of its own.

    Raises:
        ConfigError: ``shard_size`` is no size.
    """
    try:
        plan = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size '{shard_size}' is no size: give bytes, or a text such as '2GB'.") from error
    partials = {file: folder / f"{file}.partial" for file in plan.filename_to_tensors}
    try:
        for file, names in plan.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, partials[file], metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            partials[_INDEX] = folder / f"{_INDEX}.partial"
            partials[_INDEX].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for file, partial in partials.items():
            partial.replace(folder / file)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name not in partials and (path.name == _INDEX or _WEIGHTS.fullmatch(path.name)):
            path.unlink()


def _quantization(packed: dict[str, NF4Weight], dense: list[str], dtype: object) -> dict[str, Any]:
    """What config.json says of a bitsandbytes 4-bit checkpoint, as transformers' ``BitsAndBytesConfig`` reads it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(weight.nested_absmax is not None for weight in packed.values()),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
