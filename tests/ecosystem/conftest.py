"""Fixtures of the ecosystem's tests: one start of an adapter, on jebi's model and, through PEFT, on transformers'."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from jebi.adapters.peft_files import adapter_tensors
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM


@pytest.fixture(autouse=True, scope="session")
def _no_bars() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def start(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose B is not zero any more, so that it and its reference differ from the base model."""
    folder = tmp_path_factory.mktemp("start")
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.float32, False, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in adapter_tensors(model).items():
            if "lora_B" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def ours(tiny_folder: Path, start: Path) -> JebiForCausalLM:
    """jebi's model with the start on it."""
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.float32, False, device="cpu")
    return FastLanguageModel.put_adapter(model, start)


@pytest.fixture
def theirs(tiny_folder: Path, start: Path) -> PeftModel:
    """transformers' model with the start on it, to be trained."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, start, is_trainable=True)


@pytest.fixture(scope="session")
def assert_close() -> Callable[[dict[str, Tensor], dict[str, Tensor], float], None]:
    """``assert_close(left, right, bar)``: by name, the root mean square of the difference over that of the value."""

    def check(left: dict[str, Tensor], right: dict[str, Tensor], bar: float) -> None:
        assert left.keys() == right.keys()
        for name, value in left.items():
            error = ((value - right[name]).norm() / value.norm()).item()
            assert error <= bar, f"{name}: {error:.3g}"

    return check
