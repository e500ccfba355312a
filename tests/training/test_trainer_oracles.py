"""``SFTTrainer`` against TRL's and transformers' trainers: the same losses and adapter from the same start.

And the other way round: both of them take jebi's model, train it to what jebi's trainer makes of it, and save it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

Fixture = Callable[..., Any]

# TRL sets `gradient_checkpointing`, which this transformers calls by another name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

STEPS: dict[str, Any] = {
    "max_steps": 5,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "warmup_steps": 2,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
}
"""The run: given to every trainer alike."""
AROUND: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}

ROUNDING = 1e-5
"""Bar for adapters after 5 steps of Adam whose gradients come from two implementations.

Both compute in float32 and differ in the order of sums; Adam divides each component by its own size, which makes more
of a difference where components nearly cancel. Measured up to 3.5e-7.
"""
LOSS = 1e-6
"""Bar for losses of about 6 in float32: 7 digits, of which the last feels the adapters' rounding."""


@pytest.fixture
def assert_as_ours(
    make_trainer: Fixture, losses: Fixture, snapshot: Fixture, assert_close: Fixture
) -> Callable[[Trainer, dict[str, Tensor]], None]:
    """``assert_as_ours(trainer, adapter)``: its losses and the adapter are those of jebi's own run."""
    ours = make_trainer(**STEPS)
    ours.train()

    def check(trainer: Trainer, adapter: dict[str, Tensor]) -> None:
        assert losses(trainer) == pytest.approx(losses(ours), rel=LOSS)
        assert_close(adapter, snapshot(ours.model), ROUNDING)

    return check


def trl_config(folder: Path, **settings: Any) -> trl.SFTConfig:
    return trl.SFTConfig(**(STEPS | AROUND | {"output_dir": str(folder), "bf16": False, "max_length": 128} | settings))


def saved(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """The adapter as the trainer saves it."""
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def test_trl_and_peft_make_the_same_adapter(
    assert_as_ours: Fixture,
    make_model: Fixture,
    tiny_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
) -> None:
    make_model().save_pretrained(tmp_path / "start")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    config = trl_config(tmp_path / "trl")
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert_as_ours(trainer, saved(trainer, tmp_path / "saved"))


def test_trl_trains_our_model_to_the_same_adapter(
    assert_as_ours: Fixture, make_model: Fixture, tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """With its defaults, recomputation among them."""
    config = trl_config(tmp_path / "trl")
    trainer = trl.SFTTrainer(model=make_model(), args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.model.model.checkpointing == "recompute"
    assert_as_ours(trainer, saved(trainer, tmp_path / "saved"))


@pytest.mark.parametrize("settings", [{"packing": True}, {"bf16": True}])
def test_trl_trains_our_model_with_other_settings(
    settings: dict[str, Any],
    make_model: Fixture,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
    losses: Fixture,
) -> None:
    """Packed, it passes positions that restart; with bf16, its default, it computes under autocast."""
    config = trl_config(tmp_path / "trl", max_steps=-1, num_train_epochs=4, lr_scheduler_type="constant", **settings)
    trainer = trl.SFTTrainer(model=make_model(), args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


def trainer_of(model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerFast, folder: Path, **settings: Any) -> Trainer:
    """A plain Trainer over padded batches."""
    tokenised = rows.map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    return Trainer(
        model=model,
        args=TrainingArguments(**(STEPS | AROUND | {"output_dir": str(folder)} | settings)),
        train_dataset=tokenised,
        eval_dataset=tokenised,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def test_transformers_trainer_trains_our_model_to_the_same_adapter(
    assert_as_ours: Fixture,
    make_model: Fixture,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    tmp_path: Path,
) -> None:
    trainer = trainer_of(make_model(), rows, tokenizer, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert_as_ours(trainer, saved(trainer, tmp_path / "saved"))
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_transformers_trainer_says_that_it_cannot_resume_our_adapter(
    make_model: Fixture, tokenizer: PreTrainedTokenizerFast, rows: Dataset, tmp_path: Path
) -> None:
    """It knows PEFT's models only; resuming is `SFTTrainer`'s. What matters is that it does not start afresh."""
    trainer_of(make_model(), rows, tokenizer, tmp_path, save_strategy="steps", save_steps=2).train()
    again = trainer_of(make_model(), rows, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="checkpoint"):
        again.train(resume_from_checkpoint=True)
