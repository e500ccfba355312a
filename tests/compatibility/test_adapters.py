"""Every family with every kind of adapter, read by PEFT; all weights trained; a resized vocabulary. In float32.

The bar is that of `test_families`: 1e-4 of the largest value, where float32's roundings stay near 1e-6.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.fast import FastLanguageModel
from jebi.models.files import find
from jebi.models.loading import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

BAR = 1e-4
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "mistral, window", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
every = pytest.mark.parametrize("name", FAMILIES)
KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "whole tables and norms": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


@every
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_peft_computes_the_same(name: str, settings: dict[str, Any], checkpoint, load, tmp_path: Path) -> None:
    ours = load(checkpoint(name))
    attach(ours, LoraConfig(r=4, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(ours).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    ours.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    mine, other = ours.train()(IDS, labels=IDS, return_logits=True), theirs(IDS, labels=IDS, use_cache=False)
    assert difference(mine.logits, other.logits) <= BAR
    mine.loss.backward()
    other.loss.backward()
    parameters = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in theirs.named_parameters()}
    for path, tensor in adapter_tensors(ours).items():
        path += ".weight" if path.endswith("magnitude_vector") else ""
        expected = parameters[path].grad
        assert expected is not None
        if "init_lora_weights" in settings:
            rank = tensor.shape[0 if "lora_A" in path else 1]  # of PEFT's, the first half is the trained one
            expected = expected[:rank] if "lora_A" in path else expected[:, :rank]
        assert difference(tensor.grad, expected) <= BAR, path


@every
def test_loftq_comes_nearer(name: str, checkpoint, load) -> None:
    exact, model = load(checkpoint(name)), load(checkpoint(name), load_in_4bit=True)
    maps = dict(exact.linears())

    def miss() -> float:
        total = 0.0
        for path, linear in model.linears():
            near = linear.dense()
            if linear.lora is not None:
                near = near + linear.lora.scale * linear.lora.B_Nr @ linear.lora.A_rK
            total += float((maps[path].dense() - near).square().sum())
        return total

    with torch.no_grad():
        before = miss()
        attach(model, LoraConfig(r=4, loftq_config={"loftq_iter": 2}))
        assert miss() < 0.9 * before


@every
def test_all_weights_have_transformers_gradients(name: str, checkpoint) -> None:
    files = find(str(checkpoint(name)))
    ours = load_model(files, files.config(), torch.float32, torch.device("cpu"), "masters").train()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = dict(theirs.named_parameters())
    assert {path for path, _ in ours.named_parameters()} == expected.keys()
    for path, parameter in ours.named_parameters():
        assert difference(parameter.grad, expected[path].grad) <= BAR, path


@every
@torch.no_grad()
def test_a_resized_vocabulary_travels_with_the_adapter(name: str, checkpoint, load, tmp_path: Path) -> None:
    ours = load(checkpoint(name))
    ours.resize_token_embeddings(310)
    attach(ours, LoraConfig(r=4))
    ours.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32)
    base.resize_token_embeddings(310, mean_resizing=False)
    ids = IDS + 10
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)(ids, use_cache=False)
    assert difference(ours(ids).logits, theirs.logits) <= BAR
    again = FastLanguageModel.put_adapter(load(checkpoint(name)), tmp_path)
    assert torch.equal(again(ids).logits, ours(ids).logits)
