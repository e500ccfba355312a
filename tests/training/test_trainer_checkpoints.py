"""Saving, resuming and stopping: a checkpoint is whole or absent, and going on from one changes nothing."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from jebi.adapters.peft_files import adapter_tensors
from jebi.errors import AdapterError, DivergedError
from jebi.fast import FastLanguageModel
from jebi.training.optimizer import AdamW8bit
from jebi.training.trainer import SFTTrainer

Fixture = Callable[..., Any]

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def is_whole(checkpoint: Path) -> bool:
    names = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")
    return all((checkpoint / name).is_file() for name in (*names, "rng_state.pth", "tokenizer.json"))


class AtStep(TrainerCallback):
    """Does something as a step begins."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            self.action()


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_is_the_uninterrupted_one(
    stop: int,
    make_trainer: Fixture,
    make_model: Fixture,
    tmp_path: Path,
    snapshot: Fixture,
    losses: Fixture,
    assert_equal: Fixture,
) -> None:
    """Rows shuffled, three steps an epoch, 8-bit moments, a falling rate: in an epoch's middle and between epochs."""
    settings = {
        "num_train_epochs": 2,
        "optim": "adamw_8bit",
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    # At rank 64 the adapters' matrices are large enough to get 8-bit moments.
    straight = make_trainer(model=make_model(r=64), **settings)
    straight.train()
    assert isinstance(straight.optimizer.optimizer, AdamW8bit)
    assert any("absmax1" in state for state in straight.optimizer.optimizer.state.values())
    resumed = make_trainer(model=make_model(r=64, random_state=1), output_dir=str(tmp_path / "again"), **settings)
    torch.rand(7)  # whatever else the new process has drawn
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 6
    assert losses(resumed) == losses(straight)
    assert_equal(snapshot(resumed.model), snapshot(straight.model))
    assert resumed.report.steps == 6 - stop


def test_packed_rows_go_on_in_the_middle_of_an_epoch(
    make_trainer: Fixture, tmp_path: Path, snapshot: Fixture, losses: Fixture, assert_equal: Fixture
) -> None:
    """Sequences are shuffled, and the run is resumed within the second epoch, after each of its first three steps."""
    settings = {"packing": True, "max_seq_length": 64, "per_device_train_batch_size": 2, "num_train_epochs": 2} | SAVING
    straight = make_trainer(**settings)
    straight.train()
    epoch = -(-len(straight.train_dataset) // 2)
    assert len(straight.train_dataset) < 21
    assert epoch > 3
    for stop in range(epoch + 1, epoch + 4):
        resumed = make_trainer(output_dir=str(tmp_path / str(stop)), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{stop}"))
        assert losses(resumed) == losses(straight)
        assert_equal(snapshot(resumed.model), snapshot(straight.model))


def test_dropout_goes_on_with_the_same_masks(
    make_trainer: Fixture, make_model: Fixture, tmp_path: Path, snapshot: Fixture, assert_equal: Fixture
) -> None:
    def trainer(folder: str) -> SFTTrainer:
        model = make_model(lora_dropout=0.2)
        return make_trainer(model=model, output_dir=str(tmp_path / folder), max_steps=4, **SAVING)  # type: ignore[no-any-return]

    straight, resumed = trainer("one"), trainer("two")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert_equal(snapshot(resumed.model), snapshot(straight.model))


def test_the_last_checkpoint_is_found_and_its_file_is_peft_s(
    make_trainer: Fixture, tmp_path: Path, snapshot: Fixture, assert_equal: Fixture
) -> None:
    first = make_trainer(max_steps=2, **SAVING)
    first.train()
    assert is_whole(tmp_path / "out" / "checkpoint-2")
    loaded, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "out" / "checkpoint-2"), 128, torch.float32, load_in_4bit=False, device="cpu"
    )
    assert_equal(snapshot(loaded), snapshot(first.model))
    again = make_trainer(max_steps=3, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert again.report.steps == 1


def test_no_token_is_saved(make_trainer: Fixture, tmp_path: Path) -> None:
    """Trainer pickles its settings beside the adapter, which is to be given away."""
    secret = "hf_abcdefghijklmnop"
    trainer = make_trainer(max_steps=1, hub_token=secret, **SAVING)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == secret
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "adapter_model.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_another_models_checkpoint_is_refused(make_trainer: Fixture, make_model: Fixture, tmp_path: Path) -> None:
    make_trainer(max_steps=1, **SAVING).train()
    other = make_trainer(model=make_model(r=8), output_dir=str(tmp_path / "other"), max_steps=2)
    with pytest.raises(AdapterError, match=r"made for another model: tensor .* has shape"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_the_best_checkpoint_is_loaded_in_the_end(
    make_trainer: Fixture, make_model: Fixture, rows: Dataset, tmp_path: Path, snapshot: Fixture, assert_equal: Fixture
) -> None:
    """From the third step on it climbs, so that the best is not the last."""
    model = make_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else -1.0)
    trainer = make_trainer(
        model=model,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        **SAVING,
        trainer={"eval_dataset": rows, "optimizers": (optimizer, scheduler)},
    )
    trainer.train()
    curve = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = curve.index(min(curve)) + 1
    assert best == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-2")
    assert trainer.state.best_metric == min(curve)
    assert trainer.evaluate()["eval_loss"] == min(curve)
    assert folders(tmp_path / "out") == ["checkpoint-2"]
    saved, _ = FastLanguageModel.from_pretrained(
        str(tmp_path / "out" / "checkpoint-2"), 128, torch.float32, load_in_4bit=False, device="cpu"
    )
    assert_equal(snapshot(saved), snapshot(trainer.model))


def test_each_checkpoint_notes_the_best_one_where_it_lies(make_trainer: Fixture, rows: Dataset, tmp_path: Path) -> None:
    trainer = make_trainer(
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        **SAVING,
        trainer={"eval_dataset": rows},
    )
    trainer.train()
    for step in (1, 2):
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "out" / f"checkpoint-{step}")


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (2, [3, 4]), (1, [4])])
def test_older_checkpoints_go(limit: int | None, kept: list[int], make_trainer: Fixture, tmp_path: Path) -> None:
    make_trainer(max_steps=4, save_total_limit=limit, **SAVING).train()
    assert folders(tmp_path / "out") == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model"])
def test_a_checkpoint_that_breaks_off_is_absent_and_the_next_run_saves_again(
    part: str, make_trainer: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(SFTTrainer, part)

    def breaks(self: SFTTrainer, output_dir: str, *args: Any, **kwargs: Any) -> None:
        whole(self, output_dir, *args, **kwargs)
        if output_dir.endswith("checkpoint-2"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SFTTrainer, part, breaks)
        with pytest.raises(OSError, match="No space left"):
            make_trainer(max_steps=3, **SAVING).train()
    assert [name for name in folders(tmp_path / "out") if name.startswith("checkpoint")] == ["checkpoint-1"]
    assert is_whole(tmp_path / "out" / "checkpoint-1")

    make_trainer(max_steps=3, save_strategy="steps", save_steps=3).train()
    assert folders(tmp_path / "out") == ["checkpoint-1", "checkpoint-3"]
    assert is_whole(tmp_path / "out" / "checkpoint-3")


def test_a_checkpoint_is_replaced_when_its_step_is_reached_again(make_trainer: Fixture, tmp_path: Path) -> None:
    make_trainer(max_steps=1, **SAVING).train()
    (tmp_path / "out" / "checkpoint-1" / "stale").write_text("")
    make_trainer(max_steps=1, **SAVING).train()
    assert is_whole(tmp_path / "out" / "checkpoint-1")
    assert not (tmp_path / "out" / "checkpoint-1" / "stale").exists()


def test_an_upload_begins_when_the_checkpoint_is_in_its_place(
    make_trainer: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(self: Trainer, folder: str) -> None:
        assert is_whole(Path(folder))
        pushed.append(folder)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(max_steps=2, **SAVING)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [str(tmp_path / "out" / f"checkpoint-{step}") for step in (1, 2)]


def test_a_diverged_loss_stops_the_run_names_the_rows_and_leaves_the_last_checkpoint(
    make_trainer: Fixture, tmp_path: Path
) -> None:
    trainer = make_trainer(
        learning_rate=1e30, max_steps=5, train_sampling_strategy="sequential", per_device_train_batch_size=2, **SAVING
    )
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2, rows \[2, 3\]\. Stopped; .*learning_rate"):
        trainer.train()
    assert folders(tmp_path / "out") == ["checkpoint-1"]
    assert is_whole(tmp_path / "out" / "checkpoint-1")
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_poisoned_weight_is_found_at_the_first_step(
    make_trainer: Fixture, make_model: Fixture, tmp_path: Path
) -> None:
    model = make_model()
    with torch.no_grad():
        next(iter(adapter_tensors(model).values()))[0, 0] = float("nan")
    trainer = make_trainer(
        model=model,
        max_steps=5,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        logging_nan_inf_filter=True,
        **SAVING,
    )
    with pytest.raises(DivergedError, match=r"at step 1, rows \[0, 1, 2, 3\]"):
        trainer.train()
    assert folders(tmp_path / "out") == []


@pytest.mark.parametrize("restored", [False, True])
def test_ctrl_c_finishes_the_step_saves_it_and_stops(
    restored: bool,
    make_trainer: Fixture,
    make_model: Fixture,
    tmp_path: Path,
    snapshot: Fixture,
    losses: Fixture,
    assert_equal: Fixture,
) -> None:
    """Though the run saves nothing otherwise; and what was saved goes on to the uninterrupted run's end."""
    settings: dict[str, Any] = {"num_train_epochs": 2, "optim": "adamw_8bit", "lr_scheduler_type": "linear"}
    straight = make_trainer(**settings)
    straight.train()
    before = signal.getsignal(signal.SIGINT)
    interrupt = AtStep(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = make_trainer(output_dir=str(tmp_path / "stopped"), trainer={"callbacks": [interrupt]}, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert folders(tmp_path / "stopped") == ["checkpoint-2"]
    assert is_whole(tmp_path / "stopped" / "checkpoint-2")
    assert stopped.report.steps == 2
    settings["restore_callback_states_from_checkpoint"] = restored  # the wish to stop is among them
    resumed = make_trainer(model=make_model(random_state=9), output_dir=str(tmp_path / "stopped"), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert_equal(snapshot(resumed.model), snapshot(straight.model))


def test_ctrl_c_after_the_last_step_is_saved_too(make_trainer: Fixture, tmp_path: Path) -> None:
    class AtEnd(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(max_steps=2, trainer={"callbacks": [AtEnd()]}).train()
    assert folders(tmp_path / "out") == ["checkpoint-2"]
    assert is_whole(tmp_path / "out" / "checkpoint-2")


def test_a_trainer_that_was_interrupted_may_train_again(make_trainer: Fixture) -> None:
    interrupt = AtStep(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer = make_trainer(max_steps=3, trainer={"callbacks": [interrupt]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer.remove_callback(AtStep)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_second_ctrl_c_stops_at_once(make_trainer: Fixture, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(max_steps=3, trainer={"callbacks": [AtStep(2, twice)]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert folders(tmp_path / "out") == []


def test_a_checkpoint_on_sigterm_is_whole_too(make_trainer: Fixture, tmp_path: Path) -> None:
    """transformers' ``enable_jit_checkpoint`` marks the folder as incomplete while it is being written."""
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(max_steps=5, enable_jit_checkpoint=True)
    (jit,) = [callback for callback in trainer.callback_handler.callbacks if hasattr(callback, "jit_manager")]
    trainer.add_callback(AtStep(3, lambda: setattr(jit.jit_manager, "is_checkpoint_requested", True)))
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert folders(tmp_path / "out") == ["checkpoint-2"]
    assert is_whole(tmp_path / "out" / "checkpoint-2")
    assert not (tmp_path / "out" / "checkpoint-2" / "checkpoint-is-incomplete.txt").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"loftq_config": {"loftq_iter": 2}, "load_in_4bit": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda lora: next(iter(lora)),
)
def test_every_kind_of_adapter_resumes(
    lora: dict[str, Any], make_trainer: Fixture, make_model: Fixture, snapshot: Fixture, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_8bit", "learning_rate": 1e-3}
    once, again = make_model(**lora), make_model(**lora)
    make_trainer(once, **settings, output_dir=str(tmp_path / "once")).train()
    trainer = make_trainer(again, **settings, output_dir=str(tmp_path / "again"))
    trainer.train(resume_from_checkpoint=str(tmp_path / "once" / "checkpoint-2"))
    for name, value in snapshot(once).items():
        assert torch.equal(value, snapshot(again)[name]), name
    assert torch.equal(once(torch.tensor([[5, 6, 7]])).logits, again(torch.tensor([[5, 6, 7]])).logits)
