"""transformers' text-generation pipeline writes with jebi's model what it writes with its own.

Its Trainer is in tests/training/test_trainer_oracles.py, `generate` in tests/models/test_cache.py and test_smollm2.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, pipeline

from jebi.adapters.peft_files import adapter_tensors
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM

# PEFT's word for it, which this transformers has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

Fixture = Callable[..., Any]


@pytest.fixture(scope="module")
def answering(
    tiny_llama: Fixture, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JebiForCausalLM, peft.PeftModel, PreTrainedTokenizerBase]:
    """Both models with one adapter, and SmolLM2's tokenizer with its chat template."""
    folder = tmp_path_factory.mktemp("adapter")
    name = str(tiny_llama("worded"))
    ours, tokenizer = FastLanguageModel.from_pretrained(name, 128, torch.float32, False, device="cpu")
    FastLanguageModel.get_peft_model(ours, r=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(ours).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    ours.save_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return ours, peft.PeftModel.from_pretrained(base, folder), tokenizer


TEXTS: Any = ["Hello there", "What is it? Tell me more, and take your time."]
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "제비가 뭐예요?"}]


@pytest.mark.parametrize("prompt", [TEXTS, CHAT], ids=["texts of two lengths", "chat"])
def test_text_generation(answering: tuple[Any, Any, Any], prompt: Any) -> None:
    ours, theirs, tokenizer = answering
    written = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            prompt, max_new_tokens=12, do_sample=False, batch_size=2
        )
        for model in (ours, theirs)
    ]
    assert written[0] == written[1]
    with ours.disable_adapter():
        base = pipeline("text-generation", model=ours, tokenizer=tokenizer)
        assert base(prompt, max_new_tokens=12, do_sample=False, batch_size=2) != written[0]


def test_an_adapter_is_loaded_by_a_pipeline(
    answering: tuple[Any, Any, Any], tiny_llama: Fixture, tmp_path: Path
) -> None:
    """``pipeline(model=folder)`` finds the base model by the name that jebi notes in the adapter."""
    ours, _, tokenizer = answering
    ours.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    served = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32)
    expected = pipeline("text-generation", model=ours, tokenizer=tokenizer)
    assert served(TEXTS, max_new_tokens=12, do_sample=False) == expected(TEXTS, max_new_tokens=12, do_sample=False)
