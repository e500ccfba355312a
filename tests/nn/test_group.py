"""``nn.group``: what is laid together follows the adapters, which come, go and return, and are of any rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.models.hf import JebiForCausalLM
from jebi.nn import group

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("keep", ["none", "recompute"])
def test_adapters_of_ranks_that_no_kernel_carries_are_added_before(
    keep: str, tiny_llama: Callable[..., Path], load: Callable[..., JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums in another order, in float32 over two layers."""
    results = []
    for most in (8, 4):
        monkeypatch.setattr(group, "carries", lambda rank, *_, most=most: rank <= most)
        model = load(tiny_llama("untied"))
        attach(model, LoraConfig(r=4, rank_pattern={"down_proj": 8, "up_proj": 8}))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in adapter_tensors(model).values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        model.model.stack(keep=True)
        model.model.checkpointing = keep
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append({"loss": loss} | {name: tensor.grad for name, tensor in adapter_tensors(model).items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)


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
