"""DoRA on a whole model against PEFT: the start, every gradient on both paths, dropout, 4 bits."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
SETTINGS = {"r": 4, "lora_alpha": 6, "use_dora": True, "bias": "lora_only"}


def both(load, folder):
    """jebi's model and PEFT's with the same trained tensors, and PEFT's parameters by their names in a file."""
    ours = load(folder).train()
    attach(ours, LoraConfig(**SETTINGS))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = SETTINGS | {"target_modules": list(LoraConfig().target_modules)}
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    named = {
        name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in adapter_tensors(ours).items():
            if "magnitude" in name:
                # The start: the lengths of the weight's rows, summed in another order.
                torch.testing.assert_close(tensor, named[name], rtol=1e-6, atol=0)
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            named[name].copy_(tensor)
    return ours, theirs, named


@pytest.mark.parametrize("plain", [False, True], ids=["by hand", "plain"])
@pytest.mark.parametrize("checkpointing", ["none", "recompute"])
def test_gradients_are_pefts(tiny_llama, load, plain: bool, checkpointing: str) -> None:
    ours, theirs, named = both(load, tiny_llama("biased"))
    ours.model.plain, ours.model.checkpointing = plain, checkpointing
    ours(IDS, labels=IDS).loss.backward()
    cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    assert adapter_tensors(ours).keys() == named.keys()
    for name, tensor in adapter_tensors(ours).items():
        # Of the largest gradient: float32's roundings over two layers. Lengths taken as not constant give 1e-1.
        assert (tensor.grad - named[name].grad).abs().max() <= 1e-4 * named[name].grad.abs().max(), name


def test_dropout_is_pefts(tiny_llama, load) -> None:
    """The gain keeps the undropped part of the base's product, as there; equal masks from equal seeds."""
    ours, theirs, _ = both(load, tiny_llama("biased"))
    linear = ours.model.layers[0].mlp.up_proj
    layer = theirs.base_model.model.model.layers[0].mlp.up_proj
    linear.lora.dropout, layer.lora_dropout["default"] = 0.5, nn.Dropout(0.5)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (linear, layer):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for mine, other in zip(*results, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    assert not torch.equal(linear.eval()(x), results[0][0])


@torch.no_grad()
def test_four_bits_start_unchanged_and_answer_alike(tiny_llama, load) -> None:
    from jebi.fast import FastLanguageModel

    model = load(tiny_llama(), torch.bfloat16, load_in_4bit=True)
    before = model(IDS).logits
    attach(model, LoraConfig(use_dora=True, init_lora_weights="gaussian"))
    lora = model.model.layers[0].self_attn.q_proj.lora
    assert 0.8 / 16 < lora.A_rK.std() < 1.2 / 16
    # The gain is 1 to float32, and bfloat16 rounds the product of 1 with anything to itself.
    assert torch.equal(model(IDS).logits, before)
    for tensor in adapter_tensors(model).values():
        tensor.add_(0.1)
    tuned = model(IDS).logits
    FastLanguageModel.for_inference(model)
    # Kept copies multiply the same rounded numbers.
    torch.testing.assert_close(model(IDS).logits, tuned)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, before)


@torch.no_grad()
def test_a_row_of_zeros_gives_nothing_rather_than_nan(tiny_llama, load) -> None:
    model = load(tiny_llama())
    linear = model.model.layers[0].mlp.up_proj
    linear.weight[3] = 0
    attach(model, LoraConfig(use_dora=True))
    assert linear(torch.ones(2, 64))[:, 3].tolist() == [0.0, 0.0]
