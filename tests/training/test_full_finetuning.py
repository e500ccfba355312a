"""Every weight trained: gradients and steps are transformers', masters are float32, files are in the compute dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from jebi.errors import ConfigError, WeightsError
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import read_masters

Fixture = Any
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def whole(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> JebiForCausalLM:
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), 128, dtype, device="cpu", full_finetuning=True, **settings
    )
    return model


@pytest.fixture(params=["tied", "untied", "biased"])
def folder(request: pytest.FixtureRequest, tiny_llama: Fixture, tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with the byte tokenizer beside it."""
    for path in (*tiny_llama(request.param).iterdir(), *tiny_folder.glob("token*")):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "model"


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "by hand"])
@pytest.mark.parametrize("checkpointing", ["none", "recompute"])
def test_gradients_are_transformers(folder: Path, plain: bool, checkpointing: str) -> None:
    ours = whole(folder).train()
    ours.model.plain, ours.model.checkpointing = plain, checkpointing
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    for name, parameter in ours.named_parameters():
        # Of the largest gradient: float32's roundings over two layers.
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_three_steps_are_transformers_trainers(folder: Path, make_trainer: Fixture, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in IDS.repeat(12, 1).tolist()])
    settings = {"max_steps": 3, "learning_rate": 1e-3, "weight_decay": 0.1}
    ours = whole(folder)
    ours.print_trainable_parameters()
    trainer = make_trainer(ours, rows.select(range(24)), allow=["missing-eos"], **settings)
    trainer.train()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    args = TrainingArguments(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=8, lr_scheduler_type="constant",
        optim="adamw_torch", report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    Trainer(theirs, args, train_dataset=rows, data_collator=lambda rows: _stacked(rows)).train()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        # Three of Adam's steps of 1e-3; a gradient near zero may take the other sign's for one element.
        difference = (parameter - expected[name]).abs()
        assert difference.mean() <= 1e-2 * 1e-3, name


def _stacked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_bfloat16_computes_with_float32_masters(folder: Path) -> None:
    ours = whole(folder, torch.bfloat16).train()
    assert ours.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.requires_grad for p in ours.parameters())
    trained, everything = ours.trainable_parameters()
    assert trained == everything
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name)), "no bit was lost in loading"
    logits = ours(IDS).logits
    assert logits.dtype == torch.bfloat16
    ours(IDS, labels=IDS).loss.backward()
    exact(IDS, labels=IDS).loss.backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.dtype == torch.float32
        # bfloat16 has 8 bits, and two layers of roundings add up.
        difference = (parameter.grad - exact.get_parameter(name).grad).norm()
        assert difference <= 0.05 * exact.get_parameter(name).grad.norm(), name


@torch.no_grad()
def test_it_is_written_in_the_compute_dtype_and_answers(folder: Path, tmp_path: Path) -> None:
    ours = whole(folder, torch.bfloat16)
    for parameter in ours.parameters():
        parameter.mul_(1.01)
    before = ours(IDS).logits
    FastLanguageModel.for_inference(ours)
    assert torch.equal(ours(IDS).logits, before)
    ours.save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    # Two bfloat16 models that round in different places.
    assert (theirs(IDS).logits - before).float().norm() <= 0.02 * before.float().norm()
    assert {name for name, _ in theirs.named_parameters()} == written.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(
    dtype: torch.dtype, tiny_folder: Path, make_trainer: Fixture, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "learning_rate": 1e-3, "optim": "adamw_8bit", "save_strategy": "steps", "save_steps": 2}
    once = whole(tiny_folder, dtype)
    make_trainer(once, **settings, output_dir=str(tmp_path / "once")).train()
    again = whole(tiny_folder, dtype)
    checkpoint = tmp_path / "once" / "checkpoint-2"
    stored = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    trainer = make_trainer(again, **settings, output_dir=str(tmp_path / "again"))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    for (name, one), two in zip(once.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    trainer.save_model(str(tmp_path / "end"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "end" / "model.safetensors").values()} == {dtype}


def test_what_excludes_it(tiny_llama: Fixture, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"full_finetuning trains the weights themselves, .*: drop load_in_4bit"):
        whole(tiny_folder, load_in_4bit=True)
    with pytest.raises(ConfigError, match="drop load_in_8bit"):
        whole(tiny_folder, load_in_8bit=True)
    model = whole(tiny_folder)
    with pytest.raises(ConfigError, match="loaded with full_finetuning=True and is trained as it is"):
        FastLanguageModel.get_peft_model(model)
    with pytest.raises(WeightsError, match="for which the model has no place"):
        read_masters(model, tiny_llama("biased"))
    with pytest.raises(WeightsError, match=r"lacks tensor 'model.layers.0.mlp.down_proj.bias'"):
        read_masters(whole(_with_tokenizer(tiny_llama("biased"), tiny_folder, tmp_path)), tiny_llama("tied"))


def _with_tokenizer(checkpoint: Path, tokenizer: Path, folder: Path) -> Path:
    for path in (*checkpoint.iterdir(), *tokenizer.glob("token*")):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
