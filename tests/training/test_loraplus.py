"""``training.loraplus``: PEFT's groups and rates, whatever the optimizer; resumed bit for bit."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from jebi.adapters.peft_files import adapter_tensors
from jebi.errors import ConfigError

Fixture = Any
LORA = {"use_dora": True, "bias": "all", "r": 4, "lora_alpha": 8}


def rates_of(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by name."""
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd"])
def test_the_rates_are_pefts(optim: str, make_trainer: Fixture, load: Fixture, tiny_llama: Fixture) -> None:
    from jebi.adapters.lora import attach
    from jebi.config import LoraConfig

    folder = tiny_llama("biased")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(LoraConfig().target_modules), **LORA)
    theirs = peft.get_peft_model(base, config)
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    names = {
        id(p): name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
        for name, p in theirs.named_parameters()
    }
    model = load(folder)
    attach(model, LoraConfig(**LORA))
    settings = {"loraplus_lr_ratio": 16, "learning_rate": 1e-3, "weight_decay": 0.1, "optim": optim}
    optimizer = make_trainer(model, **settings).create_optimizer()
    ours = {id(p): name for name, p in adapter_tensors(model).items()}
    assert rates_of(optimizer, ours) == rates_of(expected, names)
    assert {rate for rate, _ in rates_of(optimizer, ours).values()} == {1e-3, 16e-3}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_it_trains_and_resumes_bit_for_bit(
    optim: str, make_model: Fixture, make_trainer: Fixture, snapshot: Fixture, tmp_path: Path
) -> None:
    settings = {"loraplus_lr_ratio": 4, "learning_rate": 1e-3, "optim": optim, "lr_scheduler_type": "linear"}
    ends = {}
    for ratio in (4, None):
        model = make_model()
        trainer = make_trainer(model, **settings | {"loraplus_lr_ratio": ratio}, max_steps=6)
        trainer.train()
        ends[ratio] = snapshot(model)
    assert any(not torch.equal(ends[4][name], ends[None][name]) for name in ends[4])

    first = {"output_dir": str(tmp_path / "resumed"), "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    make_trainer(make_model(), **settings | first).train()
    model = make_model()
    trainer = make_trainer(model, **settings | first)
    trainer.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"))
    for name, value in snapshot(model).items():
        assert torch.equal(value, ends[4][name]), name


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_embeddings_have_a_rate_of_their_own(make_model: Fixture, make_trainer: Fixture) -> None:
    model = make_model(modules_to_save=["embed_tokens", "lm_head"])
    trainer = make_trainer(model, embedding_learning_rate=1e-5, loraplus_lr_ratio=2, learning_rate=1e-3)
    rates = rates_of(trainer.create_optimizer(), {id(p): name for name, p in adapter_tensors(model).items()})
    assert {name: rate for name, (rate, _) in rates.items() if "lora" not in name} == {
        "base_model.model.model.embed_tokens.weight": 1e-5,
        "base_model.model.lm_head.weight": 1e-5,
    }
    assert {rate for rate, _ in rates.values()} == {1e-5, 1e-3, 2e-3}


def test_rates_that_do_nothing_are_refused(make_model: Fixture, make_trainer: Fixture) -> None:
    with pytest.raises(ConfigError, match="loraplus_lr_ratio must be above 0, not 0"):
        make_trainer(loraplus_lr_ratio=0)
    model = make_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio does nothing beside an optimizer of your own"):
        make_trainer(model, trainer={"optimizers": (optimizer, None)}, loraplus_lr_ratio=4)
    with pytest.raises(ConfigError, match=r"embedding_learning_rate needs modules_to_save=\['embed_tokens'"):
        make_trainer(embedding_learning_rate=1e-5).create_optimizer()
