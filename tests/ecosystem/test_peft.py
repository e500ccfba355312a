"""PEFT merges jebi's adapter into transformers' model, and jebi loads what it saves; scoring adapters go both ways.

Adapter files of language models, in all their kinds, are in tests/adapters/test_peft_files.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jebi.adapters.lora import attach
from jebi.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.errors import AdapterError, ModelError
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.models.reward import JebiForSequenceClassification

Load = Callable[..., JebiForCausalLM]
Folder = Callable[[str], Path]

LENGTHS = (11, 7, 4)
PAD = 0


def rows(side: str) -> dict[str, Tensor]:
    """Rows of `LENGTHS`, padded on one side."""
    drawn = torch.randint(3, 300, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    places = torch.arange(max(LENGTHS))[None]
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (places < lengths if side == "right" else places >= max(LENGTHS) - lengths).long()
    return {"input_ids": drawn.where(mask == 1, PAD), "attention_mask": mask}


def close(ours: Tensor, theirs: Tensor) -> None:
    """Of the largest value: float32's roundings over two layers; a wrong scale or a head left out is off by 1e-2."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def moved(model: Any) -> None:
    """Move everything trained away from its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"bias": "all"}], ids=["plain", "rslora", "biases"])
@torch.no_grad()
def test_merged_by_peft_and_loaded_again(
    tiny_llama: Folder, load: Load, tmp_path: Path, settings: dict[str, Any]
) -> None:
    ours = load(tiny_llama("biased"))
    attach(ours, LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    moved(ours)
    ours.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama("biased"), dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert again.adapter is None
    inputs = rows("right")
    real = inputs["attention_mask"] == 1
    close(again(**inputs).logits[real], ours(**inputs).logits[real])
    close(again(**inputs).logits[real], merged(**inputs).logits[real])
    assert (again(**inputs).logits - load(tiny_llama("biased"))(**inputs).logits).abs().max() > 0.1


@pytest.fixture
def scoring(tiny_llama: Folder, load: Load) -> JebiForSequenceClassification:
    """A scoring model away from its start."""
    model = load(tiny_llama("untied"))
    attach(model, LoraConfig(r=4, lora_alpha=6))
    scoring = FastLanguageModel.reward_model_of(model)
    scoring.config.pad_token_id = PAD
    moved(scoring)
    return scoring


def their_scoring(folder: Path) -> Any:
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = PAD
    return base


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_peft_reads_a_scoring_adapter(
    scoring: JebiForSequenceClassification, tiny_llama: Folder, tmp_path: Path, side: str
) -> None:
    scoring.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(their_scoring(tiny_llama("untied")), tmp_path)
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    scores, expected = scoring(**rows(side)).logits, theirs(**rows(side)).logits
    close(scores, expected)
    assert scores.std() > 0.1
    theirs.save_pretrained(tmp_path / "again")
    written, again = load_file(tmp_path / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert written.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())


@torch.no_grad()
def test_jebi_reads_a_scoring_adapter(tiny_llama: Folder, load: Load, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(their_scoring(tiny_llama("untied")), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = FastLanguageModel.reward_model_of(load(tiny_llama("untied")))
    ours.config.pad_token_id = PAD
    FastLanguageModel.put_adapter(ours, tmp_path)
    close(ours(**rows("right")).logits, theirs.eval()(**rows("right")).logits)


@torch.no_grad()
def test_scores_without_a_pad_token_are_read_at_the_masks_end(scoring: JebiForSequenceClassification) -> None:
    expected = scoring(**rows("right")).logits
    scoring.config.pad_token_id = None
    assert torch.equal(scoring(**rows("right")).logits, expected)
    for index, length in enumerate(LENGTHS):
        close(scoring(rows("right")["input_ids"][index : index + 1, :length]).logits, expected[index : index + 1])


def test_a_scoring_model_shares_its_layers(tiny_llama: Folder, load: Load) -> None:
    model = load(tiny_llama(), load_in_4bit=True)
    scoring = FastLanguageModel.reward_model_of(model)
    assert scoring.model is model.model
    assert [name for name, parameter in scoring.named_parameters() if parameter.requires_grad] == ["score.weight"]
    assert scoring.score.weight.dtype == torch.float32


@torch.no_grad()
def test_a_whole_scoring_model_is_transformers(tiny_llama: Folder, load: Load, tmp_path: Path) -> None:
    scoring = FastLanguageModel.reward_model_of(load(tiny_llama("untied")))
    scoring.config.pad_token_id = PAD
    scoring.save_pretrained(tmp_path)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    close(scoring(**rows("right")).logits, theirs(**rows("right")).logits)


def test_labels_are_refused(scoring: JebiForSequenceClassification) -> None:
    with pytest.raises(ModelError, match="compute the loss from its logits"):
        scoring(**rows("right"), labels=torch.ones(3))


def test_adapters_of_one_head_on_the_other_are_refused(
    scoring: JebiForSequenceClassification, tiny_llama: Folder, load: Load, tmp_path: Path
) -> None:
    scoring.save_pretrained(tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (document["task_type"], document["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    with pytest.raises(AdapterError, match=r"tensor '.*score.weight' is not in the model"):
        FastLanguageModel.put_adapter(load(tiny_llama("untied")), tmp_path)
    document["modules_to_save"] = ["score", "embed_tokens"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(document))
    with pytest.raises(AdapterError, match=r"tensor '.*embed_tokens.weight' is not in the adapter"):
        FastLanguageModel.put_adapter(FastLanguageModel.reward_model_of(load(tiny_llama("untied"))), tmp_path)
