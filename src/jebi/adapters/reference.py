"""A frozen twin of a model to hold a training against, as DPO and KTO do, without a second copy of the weights.

The twin is a model of its own: the trainer may wrap it, call its parts and hash it, and no flag of the trained one
has to be switched to and fro. Only what is trained, the adapter, exists twice.
"""

import copy

from torch import Tensor

from jebi.adapters.lora import detach
from jebi.models.hf import JebiForCausalLM


def reference_of(model: JebiForCausalLM, with_adapter: bool = True) -> JebiForCausalLM:
    """``model`` as it answers now, frozen; its frozen weights are the same tensors.

    Args:
        model: what is to be trained. TRL's ``sync_ref_model`` would write into the shared weights: leave it off.
        with_adapter: keep a copy of the adapter as it stands; False leaves the base model. At the start of a fresh
            adapter both answer alike.
    """
    shared: list[object] = [model.source]
    for module in model.modules():
        shared += [value for value in _tensors_of(module) if not value.requires_grad]
    # What the memo holds already is taken as its own copy.
    twin: JebiForCausalLM = copy.deepcopy(model, {id(value): value for value in shared})
    vars(twin).pop("forward", None)  # a trainer's own wrapping would lead back to the trained model
    if not with_adapter:
        detach(twin)
    twin.requires_grad_(False)
    twin.eval()
    return twin


def _tensors_of(module: object) -> list[Tensor]:
    held = vars(module)
    values = (*held["_parameters"].values(), *held["_buffers"].values(), *held.values())
    return [value for value in values if isinstance(value, Tensor)]
