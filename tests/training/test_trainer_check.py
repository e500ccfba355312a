"""``SFTTrainer`` and the check: before step 0, once, on the first process, and never without a way past it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from jebi.errors import CheckError, ConfigError
from jebi.training.arguments import SFTConfig

Fixture = Callable[..., Any]


@pytest.fixture
def endless() -> Dataset:
    """Rows without EOS, two of them equal."""
    return Dataset.from_dict({"text": ["one", "two", "three", "two", "five", "six", "seven", "eight"]})


def test_rows_not_worth_training_on_stop_before_anything_is_computed(make_trainer: Fixture, endless: Dataset) -> None:
    trainer = make_trainer(train_dataset=endless, max_steps=1)
    for _ in range(2):
        with pytest.raises(CheckError, match=r"missing-eos: 8 of 8 rows .*--allow missing-eos"):
            trainer.train()
    assert trainer.state.global_step == 0


def test_what_is_allowed_trains_and_the_rest_is_told_in_one_line_each(
    make_trainer: Fixture, endless: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(train_dataset=endless, max_steps=1, allow=["missing-eos"])
    with caplog.at_level(logging.WARNING, "jebi.training.prepared"):
        trainer.train()
        trainer.train()
    told = [record.getMessage() for record in caplog.records if record.name == "jebi.training.prepared"]
    assert [line.split(":")[0] for line in told] == ["duplicates"], "once, however often one trains"
    assert told[0].startswith("duplicates: 1 of 8 rows (row 3)")
    assert trainer.state.global_step == 1
    assert {finding.code for finding in trainer.data_report.findings} == {"missing-eos", "duplicates"}


def test_clean_rows_are_trained_in_silence(make_trainer: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(max_steps=1)
    with caplog.at_level(logging.WARNING, "jebi"):
        trainer.train()
    assert trainer.data_report.findings == ()
    assert caplog.records == []


def test_held_out_rows_are_held_against_the_trained_ones(make_trainer: Fixture, rows: Dataset) -> None:
    trainer = make_trainer(max_steps=1, packing=True, trainer={"eval_dataset": {"a": rows.select([3, 4])}})
    trainer.train()
    (finding,) = trainer.data_report.findings
    assert (finding.code, finding.count, finding.of) == ("leak", 2, 2)


def test_only_the_first_process_looks(make_trainer: Fixture, endless: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(train_dataset=endless, max_steps=1)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert trainer.data_report is None


def test_the_texts_beside_a_formatting_function_are_looked_at(make_trainer: Fixture) -> None:
    raw = Dataset.from_dict({"question": ["a", "b </s> c", "d"], "answer": ["1", "2", "3"]})
    function = {"formatting_func": lambda row: f"{row['question']}={row['answer']}</s>"}
    trainer = make_trainer(train_dataset=raw, max_steps=1, trainer=function)
    trainer.train()
    (finding,) = trainer.data_report.findings
    assert (finding.code, finding.examples) == ("special-in-text", (1,))


def test_the_models_own_eos_counts(make_trainer: Fixture, make_model: Fixture, tokenizer: Any) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [2, tokenizer(".")["input_ids"][0]]
    texts = Dataset.from_dict({"text": ["One.", "Two.", "Three."]})
    trainer = make_trainer(model=model, train_dataset=texts, max_steps=1)
    trainer.train()
    assert trainer.data_report.findings == ()


def test_a_code_that_is_none_is_refused(make_trainer: Fixture) -> None:
    with pytest.raises(ConfigError, match="allow: 'no-eos' is no code of the check"):
        make_trainer(allow=["no-eos"])


def test_settings_of_long_rows_are_checked_in_the_trainer(make_trainer: Fixture) -> None:
    assert (SFTConfig(output_dir="x").long, SFTConfig(output_dir="x").overlap) == ("cut", 0)
    with pytest.raises(ConfigError, match="long must be one of cut, split, refuse, not 'crop'"):
        make_trainer(long="crop")
    with pytest.raises(ConfigError, match="overlap=3 does nothing with long='cut'"):
        make_trainer(overlap=3)
