"""``SFTTrainer``'s arguments: what a script for Trainer or for the tutorial passes works, or is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from jebi import SFTConfig, SFTTrainer, is_bfloat16_supported
from jebi.errors import ConfigError
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.training import engine

Fixture = Callable[..., Any]


@pytest.mark.parametrize("flag", ["bf16", "fp16"])
def test_half_precision_asked_of_a_cpu_is_answered_and_does_not_recast_the_model(
    flag: str, make_trainer: Fixture, caplog: pytest.LogCaptureFixture, losses: Fixture
) -> None:
    """A script written for a card runs on a CPU too."""
    plain, asked = make_trainer(max_steps=2), make_trainer(max_steps=2, **{flag: True})
    assert "loaded in float32 on this CPU" in caplog.text
    plain.train()
    asked.train()
    assert losses(asked) == losses(plain)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Trainer would move the model to the card")
@pytest.mark.parametrize("flags", [{}, {"fp16": True}])
def test_a_script_for_a_card_runs_on_a_cpu_without_a_warning(flags: dict[str, bool], make_trainer: Fixture) -> None:
    """No ``use_cpu``, memory to be pinned, and the half precision that `is_bfloat16_supported` leads to."""
    assert not is_bfloat16_supported()
    make_trainer(max_steps=1, use_cpu=False, **flags).train()


def test_the_report_counts_what_was_trained(make_trainer: Fixture, tmp_path: Path) -> None:
    trainer = make_trainer(num_train_epochs=2, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    output = trainer.train()
    assert trainer.report.steps == 6
    assert trainer.report.tokens == 2 * sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    assert trainer.report.seconds == pytest.approx(output.metrics["train_runtime"], rel=0.5, abs=0.5)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["loss"] for entry in written["log"] if "loss" in entry] == [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]
    chosen = {"checkpointing": "none", "compute": "float32", "embedding": "card", "head": "card"}
    chosen |= {"kept_layers": 0, "shipped_layers": 0}
    assert written["plan"] == {"pass_tokens": trainer.report.plan["pass_tokens"]} | chosen


def test_fp8_is_refused_before_a_step(make_trainer: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model that was moved, or given another adapter, since it was loaded."""
    trainer = make_trainer(max_steps=1)
    trainer.model.compute = "fp8"
    with pytest.raises(ConfigError, match="and this is the CPU: drop compute"):
        trainer.train()
    monkeypatch.setattr(engine, "require_card", lambda *_: None)
    next(m for _, m in trainer.model.linears() if m.lora is not None).lora.dropout = 0.1
    with pytest.raises(ConfigError, match="layer 0 has DoRA, adapter dropout or trained weights"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_second_training_goes_on_from_the_first(make_trainer: Fixture, losses: Fixture) -> None:
    trainer = make_trainer(num_train_epochs=2)
    trainer.train()
    first = losses(trainer)
    trainer.train()
    assert losses(trainer)[0] < first[0]
    assert trainer.report.steps == 6


def test_every_token_counts_as_seen(make_trainer: Fixture, byte_tokenizer: Fixture) -> None:
    """Also where the padding token is EOS, as in SmolLM2: a row's EOS is no padding."""
    tokenizer = byte_tokenizer(False)
    tokenizer.pad_token = "</s>"
    settings = {"max_steps": 3, "include_num_input_tokens_seen": "non_padding"}
    trainer = make_trainer(**settings, trainer={"tokenizer": tokenizer})
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(len(ids) for ids in trainer.train_dataset["input_ids"])


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length", "batch_rebalance"])
def test_sampling_strategies_show_every_row_once_an_epoch(strategy: str, make_trainer: Fixture) -> None:
    trainer = make_trainer(num_train_epochs=1, train_sampling_strategy=strategy)
    batches = list(trainer.get_train_dataloader())
    assert sorted(row for batch in batches for row in batch["rows"]) == list(range(21))
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 1}, {"dataloader_drop_last": True}])
def test_data_loader_settings_are_trainers(settings: dict[str, Any], make_trainer: Fixture) -> None:
    trainer = make_trainer(num_train_epochs=1, **settings)
    trainer.train()
    assert trainer.state.global_step == (2 if "dataloader_drop_last" in settings else 3)


def test_plain_training_arguments_serve_as_well(
    make_model: Fixture, tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SFTTrainer(
        model=make_model(),
        tokenizer=tokenizer,
        train_dataset=rows,
        dataset_text_field="text",
        max_seq_length=20,
        args=args,
    )
    trainer.train()
    assert max(len(ids) for ids in trainer.train_dataset["input_ids"]) == 20


def test_keywords_win_over_fields_and_fields_over_the_model(
    make_trainer: Fixture, make_model: Fixture, rows: Dataset
) -> None:
    renamed = rows.rename_column("text", "content")

    def longest(**given: Any) -> int:
        trainer = make_trainer(train_dataset=renamed, **given)
        return max(len(ids) for ids in trainer.train_dataset["input_ids"])

    field = {"dataset_text_field": "content"}
    model = make_model()
    model.max_seq_length = 40
    assert longest(model=model, **field) == 40
    assert longest(model=model, **field, max_seq_length=30) == 30
    keywords = {"max_seq_length": 20, "dataset_text_field": "content"}
    assert longest(dataset_text_field="none", max_seq_length=30, trainer=keywords) == 20
    packed = make_trainer(packing=True)
    unpacked = make_trainer(packing=True, trainer={"packing": False})
    assert len(packed.train_dataset) < len(unpacked.train_dataset) == 21


def test_the_pass_size_may_be_named(make_trainer: Fixture) -> None:
    trainer = make_trainer(max_steps=1, pass_tokens=33)
    trainer.train()
    assert trainer.report.plan["pass_tokens"] == 33


@pytest.mark.parametrize("tokens", [0, -5])
def test_an_impossible_pass_size_is_refused(tokens: int, make_trainer: Fixture) -> None:
    with pytest.raises(ConfigError, match=f"pass_tokens must be at least 1, not {tokens}"):
        make_trainer(pass_tokens=tokens)


def test_a_length_beyond_the_models_is_refused_here(make_trainer: Fixture) -> None:
    """RoPE is scaled as the model is loaded, which is past."""
    with pytest.raises(ConfigError, match=r"max_seq_length=129 exceeds the model's 128: set it in from_pretrained"):
        make_trainer(max_seq_length=129)


def test_a_model_with_nothing_to_train_is_refused(make_trainer: Fixture, tiny_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.float32, load_in_4bit=False, device="cpu")
    with pytest.raises(ConfigError, match=r"nothing is trainable: call FastLanguageModel.get_peft_model"):
        make_trainer(model=model)


def test_another_librarys_model_is_refused(make_trainer: Fixture, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model must come from FastLanguageModel.from_pretrained"):
        make_trainer(model=AutoModelForCausalLM.from_pretrained(tiny_folder))


def test_nothing_to_train_on_is_refused(make_trainer: Fixture) -> None:
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        make_trainer(train_dataset=None).train()


def test_a_missing_tokenizer_is_refused(make_trainer: Fixture) -> None:
    with pytest.raises(ConfigError, match="tokenizer is missing: pass tokenizer=tokenizer"):
        make_trainer(trainer={"tokenizer": None})


def test_predictions_are_refused(make_trainer: Fixture, rows: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"predict is not available; use evaluate .* or model.generate"):
        make_trainer().predict(rows)


def test_an_output_folder_that_cannot_be_written_is_found_before_the_rows_are_touched(
    make_trainer: Fixture, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir '.*file/out' cannot be written to: .* Name another"):
        make_trainer(output_dir=str(tmp_path / "file" / "out"), train_dataset=Dataset.from_dict({"text": []}))


def test_the_default_arguments_are_jebis(make_model: JebiForCausalLM, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainer = SFTTrainer(model=make_model())  # type: ignore[operator]
    assert isinstance(trainer.args, SFTConfig)
    assert Path(str(trainer.args.output_dir)) == Path("outputs")
