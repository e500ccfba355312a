"""Fixtures of the trainer's tests: a two-layer Llama with one token a byte, rows of text, and short runs on the CPU."""

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from jebi.adapters.peft_files import adapter_tensors
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.training.arguments import SFTConfig
from jebi.training.trainer import SFTTrainer

Adapter = dict[str, Tensor]

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True, scope="session")
def _quick() -> Iterator[None]:
    """Every `train` collects garbage, which takes 0.3 s where it looks at all that the packages have imported."""
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised rows are kept; not in the user's home, not from one test to the next."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make_model(tiny_folder: Path) -> Callable[..., JebiForCausalLM]:
    """``make_model(load_in_4bit, dtype, load_in_8bit, **lora)``: dense float32, with an adapter whose B is not zero.

    With B at zero the gradient of A is nothing but rounding, which Adam would blow up to whole steps.
    """

    def make(
        load_in_4bit: bool = False, dtype: torch.dtype = torch.float32, load_in_8bit: bool = False, **lora: Any
    ) -> JebiForCausalLM:
        model, _ = FastLanguageModel.from_pretrained(
            str(tiny_folder), 128, dtype, load_in_4bit, load_in_8bit, device="cpu"
        )
        FastLanguageModel.get_peft_model(model, **({"r": 4, "lora_alpha": 8} | lora))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, value in adapter_tensors(model).items():
                if "lora_B" in name:
                    value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        return model

    return make


def texts(count: int, seed: int = 0) -> list[str]:
    """Rows of 9 to 61 tokens, half of them with a beginning in common, each ended by EOS."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        letters = "".join(chance.choices("abcdefgh ", k=chance.randint(8, 40)))
        made.append(("### a template:\n" if number % 2 else "") + letters + "</s>")
    return made


@pytest.fixture
def rows() -> Dataset:
    """21 rows: with 8 to a step, the third step of an epoch has 5."""
    return Dataset.from_dict({"text": texts(21)})


@pytest.fixture
def make_trainer(
    make_model: Callable[..., JebiForCausalLM], rows: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., SFTTrainer]:
    """``make_trainer(model=, train_dataset=, trainer={...}, **settings)``: on the fixtures, unless told otherwise.

    ``trainer`` holds further arguments of `SFTTrainer`, ``settings`` are fields of `SFTConfig`.
    """

    def make(
        model: JebiForCausalLM | None = None,
        train_dataset: Any = rows,
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> SFTTrainer:
        args = SFTConfig(**(SETTINGS | {"output_dir": str(tmp_path / "out")} | settings))
        arguments: dict[str, Any] = {
            "model": model if model is not None else make_model(),
            "tokenizer": tokenizer,
            "train_dataset": train_dataset,
            "args": args,
        }
        return SFTTrainer(**(arguments | (trainer or {})))

    return make


@pytest.fixture(scope="session")
def snapshot() -> Callable[[JebiForCausalLM], Adapter]:
    """``snapshot(model)``: a copy of the adapter, by PEFT's names."""
    return lambda model: {name: value.detach().clone() for name, value in adapter_tensors(model).items()}


@pytest.fixture(scope="session")
def losses() -> Callable[..., list[float]]:
    """``losses(trainer)``: the logged losses, one a step."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Adapter, Adapter], None]:
    """Two adapters are equal to the bit."""

    def check(left: Adapter, right: Adapter) -> None:
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name

    return check


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Adapter, Adapter, float], None]:
    """``assert_close(left, right, bar)``: by name, the root mean square of the difference over that of the value."""

    def check(left: Adapter, right: Adapter, bar: float) -> None:
        assert left.keys() == right.keys()
        for name, value in left.items():
            error = ((value - right[name]).norm() / value.norm()).item()
            assert error <= bar, f"{name}: {error:.3g}"

    return check
