"""``modules_to_save``: PEFT's gradients on both paths, tied or not; the base stays; training resumes bit for bit."""

from pathlib import Path

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach, detach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.fast import FastLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
BOTH = ["embed_tokens", "lm_head"]


def shake(model) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("plain", [False, True], ids=["by hand", "plain"])
@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], BOTH, [*BOTH, "norm", "1.mlp.up_proj"]], ids=str)
def test_gradients_are_pefts(tiny_llama, load, tmp_path: Path, modules: list[str], variant: str, plain: bool) -> None:
    ours = load(tiny_llama(variant))
    attach(ours, LoraConfig(r=4, modules_to_save=modules))
    shake(ours)
    ours.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(variant), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    ours.train().model.plain = plain
    ours(IDS, labels=IDS).loss.backward()
    cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    named = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert adapter_tensors(ours).keys() == named.keys()
    assert {id(p) for p in ours.parameters() if p.requires_grad} == {id(p) for p in adapter_tensors(ours).values()}
    for name, tensor in adapter_tensors(ours).items():
        # Of the largest gradient: float32's roundings over two layers.
        assert (tensor.grad - named[name].grad).abs().max() <= 1e-4 * named[name].grad.abs().max(), name


@pytest.mark.parametrize("variant", ["tied", "untied"])
@torch.no_grad()
def test_the_base_stays(tiny_llama, load, variant: str) -> None:
    base = load(tiny_llama(variant), torch.bfloat16, load_in_4bit=True)
    ours = load(tiny_llama(variant), torch.bfloat16, load_in_4bit=True)
    expected = base(IDS).logits
    attach(ours, LoraConfig(modules_to_save=BOTH))
    assert ours.dtype == torch.bfloat16
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    # float32 copies of bfloat16 numbers, cast back.
    assert torch.equal(ours(IDS).logits, expected)
    shake(ours)
    tuned = ours(IDS).logits
    assert tuned.dtype == torch.bfloat16
    for _ in range(2):
        with ours.disable_adapter():
            assert torch.equal(ours(IDS).logits, expected)
        assert torch.equal(ours(IDS).logits, tuned)
        FastLanguageModel.for_inference(ours)
    detach(ours)
    assert torch.equal(ours(IDS).logits, expected)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (variant == "tied")
    assert not any(p.requires_grad for p in ours.parameters())


def test_the_originals_are_no_part_of_the_state(tiny_llama, load) -> None:
    ours = load(tiny_llama())
    attach(ours, LoraConfig(modules_to_save=BOTH))
    assert not any("base_" in name for name in ours.state_dict())
