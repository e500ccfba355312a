"""``models.vocabulary``: rows come and go as in transformers' model; adapters bring their vocabulary along."""

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_config import WEIGHTS_FILE
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.errors import AdapterError, DataError, ModelError
from jebi.fast import FastLanguageModel
from jebi.models.vocabulary import require_known

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = torch.randint(3, 310, (2, 9), generator=torch.Generator().manual_seed(0))
TABLES = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
trained = pytest.mark.parametrize("modules", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]])
variants = pytest.mark.parametrize("variant", ["tied", "untied"])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of the largest logit: float32's roundings over two layers."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def theirs_of(folder: Path, size: int):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


def shake(model) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@variants
@torch.no_grad()
def test_rows_come_and_go(tiny_llama, load, tmp_path: Path, variant: str) -> None:
    ours = load(tiny_llama(variant), load_in_4bit=True)
    before = ours(IDS.clamp(max=299)).logits
    table = ours.model.embed_tokens.weight.clone()
    assert ours.resize_token_embeddings(310) is ours.get_input_embeddings()
    assert ours.config.vocab_size == ours.model.embed_tokens.num_embeddings == ours.lm_head.out_features == 310
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (variant == "tied")
    # New rows begin as the mean; the order of 300 sums.
    torch.testing.assert_close(ours.model.embed_tokens.weight[305], table.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(IDS.clamp(max=299)).logits[..., :300], before)
    assert ours(IDS, labels=IDS).loss.isfinite()
    ours.resize_token_embeddings(301, pad_to_multiple_of=64)
    assert ours.config.vocab_size == 320
    ours.resize_token_embeddings()
    assert ours.is_resized
    ours.resize_token_embeddings(300)
    assert not ours.is_resized
    assert torch.equal(ours(IDS.clamp(max=299)).logits, before)


@variants
@torch.no_grad()
def test_the_whole_model_is_read_by_transformers(tiny_llama, load, tmp_path: Path, variant: str) -> None:
    ours = load(tiny_llama(variant))
    ours.resize_token_embeddings(310)
    ours.save_pretrained(tmp_path)
    close(ours(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits)
    assert torch.equal(load(tmp_path)(IDS).logits, ours(IDS).logits)


@trained
@variants
@torch.no_grad()
def test_peft_reads_what_jebi_writes(tiny_llama, load, tmp_path: Path, variant: str, modules) -> None:
    ours = load(tiny_llama(variant))
    ours.resize_token_embeddings(310)
    attach(ours, LoraConfig(r=2, modules_to_save=modules))
    shake(ours)
    ours.save_pretrained(tmp_path)
    assert {name for name in load_file(tmp_path / WEIGHTS_FILE) if "lora" not in name} == set(TABLES)
    close(ours(IDS).logits, peft.PeftModel.from_pretrained(theirs_of(tiny_llama(variant), 310), tmp_path)(IDS).logits)
    again = FastLanguageModel.put_adapter(load(tiny_llama(variant)), tmp_path)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    with ours.disable_adapter(), again.disable_adapter():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


@trained
@variants
@torch.no_grad()
def test_jebi_reads_what_peft_writes(tiny_llama, load, tmp_path: Path, variant: str, modules) -> None:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], modules_to_save=modules, lora_alpha=8
    )
    theirs = peft.get_peft_model(theirs_of(tiny_llama(variant), 310), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = FastLanguageModel.put_adapter(load(tiny_llama(variant)), tmp_path)
    assert ours.config.vocab_size == 310
    close(ours(IDS).logits, theirs(IDS).logits)


@torch.no_grad()
def test_an_unchanged_vocabulary_is_not_written(tiny_llama, load, tmp_path: Path) -> None:
    ours = load(tiny_llama())
    attach(ours, LoraConfig(r=2))
    ours.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / WEIGHTS_FILE))
    # PEFT's save_embedding_layers=True writes it all the same.
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama()), tmp_path)
    theirs.save_pretrained(tmp_path / "more", save_embedding_layers=True)
    again = FastLanguageModel.put_adapter(load(tiny_llama()), tmp_path / "more")
    assert torch.equal(again(IDS.clamp(max=299)).logits, ours(IDS.clamp(max=299)).logits)


def test_what_is_refused_leaves_the_model_as_it_was(tiny_llama, load, tmp_path: Path) -> None:
    ours = load(tiny_llama())
    with pytest.raises(ModelError, match="at least 1 token, not 0"):
        ours.resize_token_embeddings(0)
    ours.resize_token_embeddings(310)
    attach(ours, LoraConfig(r=2))
    with pytest.raises(ModelError, match="resize_token_embeddings comes before get_peft_model"):
        ours.resize_token_embeddings(320)
    assert ours.config.vocab_size == 310
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 2', '"r": 3'))
    other = load(tiny_llama())
    with pytest.raises(AdapterError, match="was made for another model"):
        FastLanguageModel.put_adapter(other, tmp_path)
    assert (other.config.vocab_size, other.adapter) == (300, None)
    assert not adapter_tensors(other)


@torch.no_grad()
def test_a_scoring_adapter_brings_its_vocabulary(tiny_llama, load, tmp_path: Path) -> None:
    model = load(tiny_llama())
    model.resize_token_embeddings(310)
    attach(model, LoraConfig(r=4, modules_to_save=["embed_tokens"]))
    scoring = FastLanguageModel.reward_model_of(model)
    scoring.save_pretrained(tmp_path)
    again = FastLanguageModel.put_adapter(FastLanguageModel.reward_model_of(load(tiny_llama())), tmp_path)
    assert torch.equal(again(IDS).logits, scoring(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_beyond_the_vocabulary_are_said(dtype: torch.dtype) -> None:
    ids = torch.arange(12, dtype=dtype).view(3, 4)
    require_known(ids, 12, str)
    require_known(ids[:0], 12, str)
    for wrong in (12, -1, -100):
        ids[1, 2] = wrong
        with pytest.raises(DataError, match=f"^place 6 has the token {wrong}, but the model's are 0 to 11"):
            require_known(ids, 12, lambda place: f"place {place}")
