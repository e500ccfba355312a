"""``training.trainer``: how a step is cut changes nothing but the speed; what a script may pass, works or is refused.

Other packages as judges are in ``test_trainer_oracles``, data in ``test_trainer_data``, evaluation in
``test_trainer_evaluation``, saving and stopping in ``test_trainer_checkpoints``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from jebi import SFTConfig, SFTTrainer, is_bfloat16_supported
from jebi.errors import ConfigError
from jebi.fast import FastLanguageModel
from jebi.models.hf import JebiForCausalLM
from jebi.training.optimizer import AdamW8bit

Fixture = Callable[..., Any]

ROUNDING = 1e-5
"""Bar for adapters after up to 6 steps of Adam that summed the same numbers in another order.

One gradient differs by about 1e-7 of its size (float32), and Adam divides each component by its own size, which makes
more of it where components nearly cancel: measured up to 1.8e-6 on the fixtures. Another meaning (a boundary crossed, a
row weighted otherwise) shows as 1e-3 and more.
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_4_bit_model_trains(dtype: torch.dtype, make_trainer: Fixture, make_model: Fixture, losses: Fixture) -> None:
    model = make_model(load_in_4bit=True, dtype=dtype)
    trainer = make_trainer(model=model, num_train_epochs=3, bf16=dtype == torch.bfloat16, optim="adamw_8bit")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5


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
    assert written["plan"] == {"pass_tokens": trainer.report.plan["pass_tokens"], "checkpointing": "none"}


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
