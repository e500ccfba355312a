"""``SFTTrainer.evaluate``: the mean loss over all learnt tokens, however the rows come; and label smoothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

Fixture = Callable[..., Any]

SUM = 1e-6
"""Bar for mean losses: float32 logits of order 1, added up in float32 here and chunk by chunk there."""


def hand_computed(model: Any, rows: Dataset) -> float:
    """The mean over tokens, row by row in double precision."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].double()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("batch", [1, 4, 21])
@pytest.mark.parametrize("pass_tokens", [None, 40])
def test_it_is_the_mean_over_tokens_whatever_the_batch_and_the_cut(
    batch: int, pass_tokens: int | None, make_trainer: Fixture, make_model: Fixture, rows: Dataset
) -> None:
    trainer = make_trainer(per_device_eval_batch_size=batch, pass_tokens=pass_tokens, trainer={"eval_dataset": rows})
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(hand_computed(make_model(), trainer.eval_dataset), rel=SUM)
    assert metrics["eval_samples_per_second"] == pytest.approx(21 / metrics["eval_runtime"], rel=0.1)


def test_dropout_is_off(make_trainer: Fixture, make_model: Fixture, rows: Dataset) -> None:
    trainer = make_trainer(model=make_model(lora_dropout=0.5), trainer={"eval_dataset": rows})
    trainer.model.train()
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(hand_computed(make_model(), trainer.eval_dataset), rel=SUM)


def test_unlabelled_tokens_do_not_count(make_trainer: Fixture, make_model: Fixture) -> None:
    ids, labels = [[5, 6, 7, 8, 9]], [[-100, -100, -100, 8, -100]]
    trainer = make_trainer(trainer={"eval_dataset": Dataset.from_dict({"input_ids": ids, "labels": labels})})
    with torch.no_grad():
        logits = make_model()(input_ids=torch.tensor(ids)).logits[0, 2]
    expected = nn.functional.cross_entropy(logits, torch.tensor(8)).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=SUM)


def test_several_sets_are_measured_each_under_its_name(make_trainer: Fixture, rows: Dataset) -> None:
    parts = {"short": rows.select(range(4)), "long": rows.select(range(4, 21))}
    trainer = make_trainer(trainer={"eval_dataset": parts})
    metrics = trainer.evaluate()
    for name, part in parts.items():
        alone = make_trainer(trainer={"eval_dataset": part}).evaluate()
        assert metrics[f"eval_{name}_loss"] == alone["eval_loss"]


def test_another_set_may_be_named_in_the_call(make_trainer: Fixture, rows: Dataset) -> None:
    trainer = make_trainer(trainer={"eval_dataset": rows})
    given = trainer.evaluate(rows.select(range(5)))
    assert given["eval_loss"] == make_trainer(trainer={"eval_dataset": rows.select(range(5))}).evaluate()["eval_loss"]
    ready = trainer.evaluate(trainer.eval_dataset.select(range(5)), metric_key_prefix="test")
    assert ready["test_loss"] == given["eval_loss"]
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        make_trainer().evaluate()


def test_a_stream_is_measured_too(make_trainer: Fixture, rows: Dataset) -> None:
    known = make_trainer(trainer={"eval_dataset": rows}).evaluate()
    streamed = make_trainer(trainer={"eval_dataset": rows.to_iterable_dataset()}).evaluate()
    assert streamed["eval_loss"] == known["eval_loss"]


def test_it_does_not_disturb_the_training(
    make_trainer: Fixture, rows: Dataset, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    plain = make_trainer(**settings)
    measured = make_trainer(
        **settings, eval_strategy="steps", eval_steps=1, eval_on_start=True, trainer={"eval_dataset": rows}
    )
    plain.train()
    measured.train()
    assert losses(measured) == losses(plain)
    assert_equal(snapshot(measured.model), snapshot(plain.model))
    curve = [entry["eval_loss"] for entry in measured.state.log_history if "eval_loss" in entry]
    assert len(curve) == 4
    assert curve[-1] < curve[0] - 0.2


def test_callbacks_see_every_batch(make_trainer: Fixture, rows: Dataset) -> None:
    seen = []

    class Count(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            seen.append(1)

    make_trainer(per_device_eval_batch_size=4, trainer={"eval_dataset": rows, "callbacks": [Count()]}).evaluate()
    assert len(seen) == 6


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_label_smoothing_is_transformers(
    epsilon: float, make_trainer: Fixture, make_model: Fixture, rows: Dataset, losses: Fixture
) -> None:
    trainer = make_trainer(
        label_smoothing_factor=epsilon,
        max_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=3,
        trainer={"eval_dataset": rows.select(range(3))},
    )
    ids = [torch.tensor(row) for row in trainer.train_dataset["input_ids"][:3]]
    labels = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    padded, mask = labels.clamp(min=0), labels != -100
    with torch.no_grad():
        logits = make_model()(input_ids=padded, attention_mask=mask.long()).logits
    expected = LabelSmoother(epsilon)(CausalLMOutput(logits=logits), labels, shift_labels=True).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=SUM)
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], rel=SUM)


def test_label_smoothing_has_the_gradient_of_its_loss(
    make_trainer: Fixture, make_model: Fixture, rows: Dataset, snapshot: Fixture, assert_close: Fixture
) -> None:
    """One step of plain descent against autograd through `LabelSmoother`."""
    trainer = make_trainer(
        label_smoothing_factor=0.2,
        max_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    start = snapshot(trainer.model)
    trainer.train()
    model = make_model()
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    outputs = CausalLMOutput(logits=model(input_ids=ids).logits)
    LabelSmoother(0.2)(outputs, ids, shift_labels=True).backward()
    moved = {name: start[name] - value for name, value in snapshot(trainer.model).items()}
    gradients = {name: parameter.grad for name, parameter in _trained(model).items()}
    # Two float32 implementations, and a step that is rounded once more where it is added: measured up to 5e-7.
    assert_close(gradients, moved, 1e-5)


def _trained(model: Any) -> dict[str, nn.Parameter]:
    from jebi.adapters.peft_files import adapter_tensors

    return dict(adapter_tensors(model))  # type: ignore[arg-type]
