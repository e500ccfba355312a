"""TRL's preference and reward trainers take jebi's model: the same losses and adapters as on PEFT's.

Each trains jebi's model and transformers' with PEFT's adapter, from one start, on the same rows. Its `SFTTrainer` is in
tests/training/test_trainer_oracles.py.
"""

import math
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
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Trainer

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM

Fixture = Callable[..., Any]

# TRL and PEFT call gradient checkpointing by the name that this transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

STEPS: dict[str, Any] = {
    "max_steps": 3,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}

ROUNDING = 2e-4
"""Bar for adapters after 3 steps of Adam, which move them by a third of their size.

A preference's gradient is a difference between rows, so components nearly cancel and keep few of float32's digits;
Adam then divides each by its own size. Measured up to 4.3e-5 (a value projection under DPO).
"""
LOSS = 2e-6
"""Bar for losses of order 1 that are differences of log-probabilities of order 100, in float32."""

PROMPTS = [f"{number} and {number}" for number in range(12)]
CHOSEN = [f" make {2 * number}." for number in range(12)]
REJECTED = [" cannot be told" + "." * (number % 3) for number in range(12)]


@pytest.fixture(scope="session")
def pairs() -> Dataset:
    """Prompts with an answer wanted and one not wanted, of differing lengths."""
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})


@pytest.fixture(scope="session")
def judged() -> Dataset:
    """The same as single rows, wanted or not, as KTO takes them."""
    answers = [good if number % 2 else bad for number, (good, bad) in enumerate(zip(CHOSEN, REJECTED))]
    return Dataset.from_dict(
        {"prompt": PROMPTS, "completion": answers, "label": [bool(number % 2) for number in range(12)]}
    )


def settings(config: Any, folder: Path, **more: Any) -> Any:
    return config(**(STEPS | {"output_dir": str(folder)} | more))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def saved(trainer: Trainer, folder: Path) -> dict[str, Tensor]:
    """The adapter as the trainer saves it."""
    trainer.save_model(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def frozen(model: JebiForCausalLM) -> dict[str, Tensor]:
    """Everything that is not trained, 4-bit weights included."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in trained}


@pytest.fixture
def train_both(
    ours: JebiForCausalLM, theirs: PeftModel, tmp_path: Path, assert_close: Fixture
) -> Callable[..., list[float]]:
    """``train_both(make)``: train both with ``make(model, reference, folder)``, hold them equal, return the losses."""

    def train(make: Callable[..., Trainer]) -> list[float]:
        base, before = copied(frozen(ours)), copied(adapter_tensors(ours))
        trainers = []
        for model, reference in ((ours, FastLanguageModel.reference_of(ours)), (theirs, None)):
            trainers.append(make(model, reference, tmp_path / "run"))  # which sets the seed
            trainers[-1].train()
        assert losses(trainers[0]) == pytest.approx(losses(trainers[1]), rel=LOSS, abs=LOSS)
        adapters = [saved(trainer, tmp_path / str(number)) for number, trainer in enumerate(trainers)]
        assert_close(*adapters, ROUNDING)
        assert not any(torch.equal(value, before[name]) for name, value in adapter_tensors(ours).items())
        assert all(torch.equal(value, base[name]) for name, value in frozen(ours).items())
        return losses(trainers[0])

    return train


def test_dpo(train_both: Fixture, pairs: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    def make(model: Any, reference: Any, folder: Path) -> Trainer:
        return trl.DPOTrainer(
            model,
            reference,
            settings(trl.DPOConfig, folder),
            train_dataset=pairs,
            processing_class=tokenizer,
        )

    curve = train_both(make)
    # The policy is its reference still: each ratio is 1, up to the rounding of sums of order 100.
    assert curve[0] == pytest.approx(math.log(2), abs=LOSS)
    assert curve[2] < curve[0] - 0.1


def test_dpo_with_precomputed_references(
    train_both: Fixture, pairs: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    """TRL asks the policy itself before the first step; no reference model is needed at all."""

    def make(model: Any, _: Any, folder: Path) -> Trainer:
        config = settings(trl.DPOConfig, folder, precompute_ref_log_probs=True)
        return trl.DPOTrainer(model, None, config, train_dataset=pairs, processing_class=tokenizer)

    assert train_both(make)[0] == pytest.approx(math.log(2), abs=LOSS)


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_dpo_against_the_base_model(
    tiny_folder: Path, pairs: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, load_in_4bit: bool
) -> None:
    """A fresh adapter and the model without it answer alike at the start."""
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.float32, load_in_4bit, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    base = copied(frozen(model))
    reference = FastLanguageModel.reference_of(model, with_adapter=False)
    trainer = trl.DPOTrainer(
        model, reference, settings(trl.DPOConfig, tmp_path), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=LOSS)
    assert losses(trainer)[2] < losses(trainer)[0] - 0.1
    assert all(torch.equal(value, base[name]) for name, value in frozen(model).items())
    assert all(torch.equal(value, base[name]) for name, value in reference.state_dict().items())


def test_kto(train_both: Fixture, judged: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    def make(model: Any, reference: Any, folder: Path) -> Trainer:
        config = settings(trl.KTOConfig, folder)
        return trl.KTOTrainer(model, reference, config, train_dataset=judged, processing_class=tokenizer)

    curve = train_both(make)
    assert curve[0] == pytest.approx(0.5, abs=LOSS)  # sigmoid(0), on either side
    assert curve[2] < curve[0] - 0.05


@pytest.mark.filterwarnings("ignore::trl.import_utils.TRLExperimentalWarning")
def test_orpo(train_both: Fixture, pairs: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def make(model: Any, _: Any, folder: Path) -> Trainer:
        config = settings(ORPOConfig, folder, max_length=128, remove_unused_columns=False)
        return ORPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)

    curve = train_both(make)
    assert curve[2] < curve[0] - 0.5


def test_grpo(train_both: Fixture, pairs: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """It answers with `generate`, four times a prompt, and rewards the answers."""

    def vowels(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(letter in "aeiou" for letter in text) + len(text) / 10) for text in completions]

    def make(model: Any, _: Any, folder: Path) -> Trainer:
        config = settings(
            trl.GRPOConfig, folder, per_device_train_batch_size=4, num_generations=4, max_completion_length=8, seed=1
        )
        prompts = pairs.select_columns("prompt")
        return trl.GRPOTrainer(model, vowels, config, train_dataset=prompts, processing_class=tokenizer)

    train_both(make)


def test_reward(
    ours: JebiForCausalLM,
    tiny_folder: Path,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    assert_close: Fixture,
) -> None:
    scoring = FastLanguageModel.reward_model_of(ours)
    scoring.save_pretrained(tmp_path / "start")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    curves, adapters = [], []
    for name, model in (("ours", scoring), ("theirs", theirs)):
        config = settings(trl.RewardConfig, tmp_path / name)
        trainer = trl.RewardTrainer(model, config, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()
        curves.append(losses(trainer))
        adapters.append(saved(trainer, tmp_path / f"{name}-saved"))
    assert curves[0] == pytest.approx(curves[1], rel=LOSS, abs=LOSS)
    assert curves[0][2] < curves[0][0] - 0.1
    assert_close(*adapters, ROUNDING)
    assert "base_model.model.score.weight" in adapters[0]


def test_the_reference_is_the_model_as_it_was_and_shares_its_weights(tiny_folder: Path, start: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.float32, True, device="cpu")
    FastLanguageModel.put_adapter(model, start)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        reference = FastLanguageModel.reference_of(model)
        bare = FastLanguageModel.reference_of(model, with_adapter=False)
        for value in adapter_tensors(model).values():
            value.mul_(2)
        assert torch.equal(reference(ids).logits, before)
        assert not torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(bare(ids).logits, model(ids).logits)
    for twin in (reference, bare):
        assert not twin.training
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        held, shared = frozen(model), {name: value for name, value in twin.state_dict().items() if "lora" not in name}
        assert shared.keys() == held.keys()
        assert all(value.data_ptr() == held[name].data_ptr() for name, value in shared.items())


def test_the_reference_has_the_checkpoints_biases(tiny_llama: Fixture, load: Fixture) -> None:
    model = load(tiny_llama("biased"))
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        attach(model, LoraConfig(r=4, bias="all"))
        reference = FastLanguageModel.reference_of(model, with_adapter=False)
        for value in adapter_tensors(model).values():
            value.add_(0.1)
        assert torch.equal(reference(ids).logits, before)
