"""Write a whole model as a Hugging Face checkpoint: config.json and safetensors, sharded when large.

Adapters and tokenizers are written by others; a 4-bit base is not written: its 16-bit original is the better copy.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from jebi.errors import ModelError
from jebi.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel

_SHARD_SIZE = "5GB"


def write_checkpoint(model: "JebiPreTrainedModel", folder: Path) -> None:
    """Write config, generation config and weights into ``folder``.

    Raises:
        ModelError: the model's weights are 4-bit.
    """
    if any(isinstance(linear.weight, NF4Weight) for _, linear in model.linears()):
        raise ModelError(
            "a 4-bit model without an adapter is not saved: keep its original checkpoint, "
            "or load with load_in_4bit=False to write a copy."
        )
    tensors = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        _write_atomically({name: tensors[name] for name in names}, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _write_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)
