"""``adapters.pissa``: PEFT's PiSSA, with the base as it is; its gradients, and its files both ways."""

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_config import read_config
from jebi.adapters.peft_files import adapter_tensors, read_weights
from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError
from jebi.fast import FastLanguageModel

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
PISSA = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa")


def theirs_of(folder):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": list(LoraConfig().target_modules)}
    return peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **settings))


def close(ours: torch.Tensor, theirs: torch.Tensor, share: float = 1e-4) -> None:
    """Of the largest value: float32's roundings over two layers and a decomposition."""
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("load_in_4bit", [True, False])
@torch.no_grad()
def test_it_starts_at_the_principal_part_and_changes_nothing(tiny_llama, load, load_in_4bit: bool, start: str) -> None:
    model = load(tiny_llama(), load_in_4bit=load_in_4bit)
    before = model(IDS).logits
    attach(model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=start))
    close(model(IDS).logits, before, 1e-5)
    linear = model.model.layers[1].mlp.down_proj
    values = torch.linalg.svdvals(linear.dense())
    rest = linear.dense() - 1.5 * linear.lora.B_Nr @ linear.lora.A_rK
    if start == "pissa":
        torch.testing.assert_close(torch.linalg.svdvals(rest)[:-4], values[4:], rtol=1e-4, atol=1e-4)
    assert rest.norm() < 0.99 * linear.dense().norm()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, before)


def test_gradients_are_pefts(tiny_llama, load) -> None:
    theirs, ours = theirs_of(tiny_llama()), load(tiny_llama()).train()
    attach(ours, PISSA)
    trained = {
        name.replace(".default", ""): parameter for name, parameter in theirs.named_parameters() if "lora_" in name
    }
    with torch.no_grad():  # a pair of singular vectors may have turned together
        for name, tensor in adapter_tensors(ours).items():
            flip = (tensor * trained[name]).sum(1 if "lora_A" in name else 0, keepdim=True).sign()
            trained[name].mul_(flip.reshape(-1, 1) if "lora_A" in name else flip)
            close(tensor, trained[name], 1e-3)
    ours(IDS, labels=IDS).loss.backward()
    logits = theirs(IDS).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, tensor in adapter_tensors(ours).items():
        close(tensor.grad, trained[name].grad, 1e-3)


@torch.no_grad()
def test_pefts_own_files(tiny_llama, load, tmp_path) -> None:
    """The trained half alone, beside which PEFT takes the start out of the base again; and its conversion."""
    theirs = theirs_of(tiny_llama())
    theirs.save_pretrained(tmp_path / "start")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "trained")
    ours = FastLanguageModel.put_adapter(load(tiny_llama()), tmp_path / "trained")
    close(ours(IDS).logits, expected)
    with pytest.raises(AdapterError, match=r"takes its start out of the weights .* load_in_4bit=False"):
        FastLanguageModel.put_adapter(load(tiny_llama(), load_in_4bit=True), tmp_path / "trained")
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = FastLanguageModel.put_adapter(load(tiny_llama()), tmp_path / "plain")
    assert read_config(tmp_path / "plain").r == 8
    close(plain(IDS).logits, expected)


def test_the_halves_are_told_apart_again(tiny_llama, load, tmp_path) -> None:
    model = load(tiny_llama())
    attach(model, PISSA)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1)
    model.save_pretrained(tmp_path)
    again = FastLanguageModel.put_adapter(load(tiny_llama()), tmp_path)
    for name, tensor in adapter_tensors(again).items():
        assert torch.equal(tensor, adapter_tensors(model)[name])
        assert tensor.requires_grad
    one, two = (m.model.layers[0].self_attn.q_proj.lora for m in (model, again))
    assert torch.equal(one.frozen_A_rK, two.frozen_A_rK)
    assert torch.equal(one.frozen_B_Nr, two.frozen_B_Nr)
    # And into a model whose own adapter was started anew, as a resumed training does.
    resumed = load(tiny_llama())
    attach(resumed, PISSA)
    read_weights(resumed, tmp_path)
    assert torch.equal(resumed(IDS).logits, model(IDS).logits)


def test_a_rank_beyond_the_weights(tiny_llama, load) -> None:
    model = load(tiny_llama())
    with pytest.raises(ConfigError, match=r"r=33 exceeds the rank of 'model.layers.0.self_attn.k_proj', which is 32"):
        attach(model, LoraConfig(r=33, init_lora_weights="pissa"))
    assert model.adapter is None
