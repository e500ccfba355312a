"""``nn.group``: what is laid together follows the adapters, which come, go and return."""

from collections.abc import Callable
from pathlib import Path

import torch

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.models.hf import JebiForCausalLM

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def test_an_adapter_that_was_off_for_a_while_is_cast_where_captured_passes_read_it(
    tiny_llama: Callable[..., Path], load: Callable[..., JebiForCausalLM]
) -> None:
    """As `training.graphs` does once a step: what was cast is told, and the casts are made again where they were."""
    model = load(tiny_llama("untied"))
    attach(model, LoraConfig(r=4))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        model.model.stack(keep=True)
        adapted = model(input_ids=IDS, labels=IDS).loss
        groups = [layer.stacked.qkv for layer in model.model.decoder_layers()]
        places = [group._up_NR.data_ptr() for group in groups]
        with model.disable_adapter():
            base = model(input_ids=IDS, labels=IDS).loss
        for tensor in adapter_tensors(model).values():
            tensor.mul_(1)  # a step
        model.model.cast_adapters(again=False)
        model.model.cast_adapters(again=True)
        assert [group._up_NR.data_ptr() for group in groups] == places
        assert torch.equal(model(input_ids=IDS, labels=IDS).loss, adapted)
        assert not torch.equal(base, adapted)
