"""``training.trainer``: how a step is cut, and what layers keep meanwhile, changes nothing but speed and memory.

Other packages as judges are in ``test_trainer_oracles``, arguments in ``test_trainer_settings``, data in
``test_trainer_data``, evaluation in ``test_trainer_evaluation``, saving and stopping in ``test_trainer_checkpoints``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from jebi.data.passes import cut
from jebi.fast import FastLanguageModel
from jebi.training.optimizer import AdamW8bit

Fixture = Callable[..., Any]

ROUNDING = 1e-5
"""Bar for adapters after up to 6 steps of Adam that summed the same numbers in another order.

One gradient differs by about 1e-7 of its size (float32), and Adam divides each component by its own size, which makes
more of it where components nearly cancel: measured up to 1.8e-6 on the fixtures. A token counted
once instead of once a row shows as 0.3.
"""


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 4), (1, 8), (3, 3)])
def test_batch_and_accumulation_only_say_which_rows_make_a_step(
    batch: int, accumulation: int, make_trainer: Fixture, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    """Two epochs of 21 rows, so the last step of each has fewer rows (and fewer micro-batches)."""
    size = batch * accumulation
    whole = make_trainer(num_train_epochs=2, per_device_train_batch_size=size)
    parts = make_trainer(
        num_train_epochs=2, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    whole.train()
    parts.train()
    assert losses(parts) == losses(whole)
    assert len(losses(parts)) == parts.state.global_step == 6
    # The same rows make the same passes, so there is not even rounding.
    assert_equal(snapshot(parts.model), snapshot(whole.model))


@pytest.mark.parametrize("pass_tokens", [1, 70, 130])
def test_the_size_of_a_pass_changes_only_rounding(
    pass_tokens: int, make_trainer: Fixture, snapshot: Fixture, losses: Fixture, assert_close: Fixture
) -> None:
    """With one token to a pass every row is a pass of its own: the literal loop over rows."""
    one = make_trainer(num_train_epochs=2)
    many = make_trainer(
        num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=4, pass_tokens=pass_tokens
    )
    one.train()
    many.train()
    # Losses of about 6 in float32: 7 digits, of which the last feels the adapters' rounding.
    assert losses(many) == pytest.approx(losses(one), rel=1e-6)
    assert_close(snapshot(many.model), snapshot(one.model), ROUNDING)


def test_a_logged_loss_is_the_mean_over_the_steps_learnt_tokens(
    make_trainer: Fixture, make_model: Fixture, losses: Fixture
) -> None:
    trainer = make_trainer(max_steps=1, train_sampling_strategy="sequential", gradient_accumulation_steps=2)
    trainer.train()
    model, total, count = make_model(), 0.0, 0
    for row in trainer.train_dataset.select(range(16)):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert losses(trainer) == pytest.approx([total / count], rel=1e-6)  # float32 logits, summed in float32


def test_operations_are_counted_without_a_walk_through_the_model(make_trainer: Fixture) -> None:
    """Trainer would ask for them before every step's passes are launched, and a card waits meanwhile."""
    trainer = make_trainer(num_train_epochs=1, gradient_accumulation_steps=2)
    walks: list[bool] = []
    trainer.model.num_parameters = lambda *_, **__: walks.append(True) or 0
    trainer.train()
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    each = trainer.model.floating_point_ops({"input_ids": torch.zeros(1)})
    assert trainer.state.total_flos == each * tokens
    assert not walks


MODES: dict[str, dict[str, Any]] = {
    "False": {"use_gradient_checkpointing": False},
    "True": {"use_gradient_checkpointing": True},
    "unsloth": {"use_gradient_checkpointing": "unsloth"},
    "auto": {"use_gradient_checkpointing": "auto"},
}
KEPT = {"False": "none", "True": "recompute", "unsloth": "offload", "auto": "none"}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_keeping_activations_gives_the_same_adapter(
    mode: str, make_trainer: Fixture, make_model: Fixture, snapshot: Fixture, assert_equal: Fixture
) -> None:
    """To the bit: what is recomputed is computed as it was."""
    plain = make_trainer(model=make_model(use_gradient_checkpointing=False), max_steps=2)
    other = make_trainer(model=make_model(**MODES[mode]), max_steps=2)
    plain.train()
    other.train()
    assert other.model.model.checkpointing == KEPT[mode]
    assert_equal(snapshot(other.model), snapshot(plain.model))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"activation_checkpointing": True}, "recompute"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}, "offload"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}, "recompute"),
        ({"gradient_checkpointing": True}, "recompute"),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # by transformers
def test_the_arguments_may_ask_for_recomputation_too(
    settings: dict[str, Any], kept: str, make_trainer: Fixture, make_model: Fixture
) -> None:
    trainer = make_trainer(model=make_model(use_gradient_checkpointing=False), max_steps=1, **settings)
    trainer.train()
    assert trainer.model.model.checkpointing == trainer.report.plan["checkpointing"] == kept


def test_a_user_who_recomputes_already_keeps_the_mode_when_the_arguments_ask_again(
    make_trainer: Fixture, make_model: Fixture
) -> None:
    model = make_model(use_gradient_checkpointing="unsloth")
    trainer = make_trainer(model=model, max_steps=1, activation_checkpointing=True)
    trainer.train()
    assert model.model.checkpointing == "offload"


def test_dropout_trains_and_is_reproducible_by_its_seed(
    make_trainer: Fixture, make_model: Fixture, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    results = {}
    for run, seed in (("first", 1), ("again", 1), ("other", 2)):
        trainer = make_trainer(model=make_model(lora_dropout=0.3), num_train_epochs=3, seed=seed, data_seed=0)
        trainer.train()
        results[run] = (snapshot(trainer.model), losses(trainer))
    assert_equal(results["again"][0], results["first"][0])
    assert results["other"][1] != results["first"][1]
    assert results["first"][1][-1] < results["first"][1][0] - 0.5


def test_with_dropout_rows_share_no_tokens_and_so_no_mask(
    make_trainer: Fixture, make_model: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = []

    def watched(batches: Any, tokens: int, share: bool = True) -> Any:
        shared.append(share)
        return cut(batches, tokens, share)

    monkeypatch.setattr("jebi.data.dealing.cut", watched)
    make_trainer(model=make_model(lora_dropout=0.1), max_steps=1).train()
    make_trainer(max_steps=1).train()
    assert shared == [False, True]


def test_rows_whose_rope_follows_their_length_are_trained_as_each_alone(
    tiny_folder: Path, make_trainer: Fixture, losses: Fixture
) -> None:
    """Rows of 105 to 205 tokens with 100 in common, of a model whose frequencies change at 128."""
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny_folder), 256, torch.float32, load_in_4bit=False, device="cpu", rope_scaling=scaling
    )
    FastLanguageModel.get_peft_model(model, r=4)
    texts = ["abcde" * 20 + letter * (20 * n) + "</s>" for n, letter in enumerate("fghijk")]
    rows = Dataset.from_dict({"text": texts})
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0}
    data = {"eval_dataset": rows, "max_seq_length": 256}
    trainer = make_trainer(model=model, train_dataset=rows, trainer=data, **settings)
    trainer.train()
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        theirs = AutoModelForCausalLM.from_pretrained(
            tiny_folder, dtype=torch.float32, rope_parameters=scaling | {"rope_theta": 10000.0}
        )
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            total += theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    # Float32 losses; with one row's frequencies for all of them it is off by more than 0.01.
    assert [*losses(trainer), *evaluated] == pytest.approx([total / count] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        ({"optim": "adamw_8bit"}, AdamW8bit),
        ({"optim": "adamw_bnb_8bit"}, AdamW8bit),
        ({"optim": "adamw_torch"}, torch.optim.AdamW),
        ({"optim": "sgd", "learning_rate": 0.3}, torch.optim.SGD),
        ({"optim": "adafactor"}, None),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9"}, torch.optim.RMSprop),
    ],
)
def test_optimizers_train(
    settings: dict[str, Any], optimizer: type | None, make_trainer: Fixture, losses: Fixture
) -> None:
    trainer = make_trainer(num_train_epochs=3, **settings)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert optimizer is None or isinstance(trainer.optimizer.optimizer, optimizer)


def test_adams_settings_reach_the_8_bit_optimizer(make_trainer: Fixture) -> None:
    trainer = make_trainer(
        optim="adamw_8bit", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7, weight_decay=0.03, learning_rate=3e-3
    )
    decayed, plain = trainer.create_optimizer().param_groups
    assert (decayed["betas"], decayed["eps"], decayed["lr"]) == ((0.8, 0.95), 1e-7, 3e-3)
    assert (decayed["weight_decay"], plain["weight_decay"], plain["params"]) == (0.03, 0.0, [])


def test_trained_biases_are_not_decayed(tiny_llama: Fixture, load: Fixture, make_trainer: Fixture) -> None:
    model = FastLanguageModel.get_peft_model(load(tiny_llama("biased")), r=4, bias="all")
    trainer = make_trainer(model=model, max_steps=2, weight_decay=0.5)
    trainer.train()
    decayed, plain = trainer.optimizer.param_groups
    assert len(decayed["params"]) == len(plain["params"]) * 2 == 28  # 14 maps with A and B, and their biases


def test_an_optimizer_with_modes_is_put_into_the_right_one(make_trainer: Fixture, make_model: Fixture) -> None:
    """As optimizers without a schedule need it; transformers' own loop does the same."""

    class Modal(torch.optim.SGD):
        log: list[str] = []  # noqa: RUF012

        def train(self) -> None:
            self.log.append("train")

        def eval(self) -> None:
            self.log.append("eval")

    model = make_model()
    optimizer = Modal([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    rows = Dataset.from_dict({"text": ["some text</s>"]})
    make_trainer(
        model=model,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        trainer={"optimizers": (optimizer, scheduler), "eval_dataset": rows},
    ).train()
    assert Modal.log == ["train", "eval", "train", "eval"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantised_model_trains(
    dtype: torch.dtype, bits: int, make_trainer: Fixture, make_model: Fixture, losses: Fixture
) -> None:
    model = make_model(load_in_4bit=bits == 4, dtype=dtype, load_in_8bit=bits == 8)
    trainer = make_trainer(model=model, num_train_epochs=3, bf16=dtype == torch.bfloat16, optim="adamw_8bit")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
