"""Every setting of the section ``data`` in whole runs: what rows are and how they are written and asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jebi.config import read_run
from jebi.run import train

Run = Callable[..., Any]

JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template beside its tokenizer."""
    folder = tmp_path / "chat-model"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = JINJA
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    """Three conversations of a question and an answer."""
    turns = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": f"a{n}"}] for n in range(3)]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"conversations": two}) + "\n" for two in turns))
    return path


def learnt(config: Path, *settings: str) -> tuple[list[str], list[str]]:
    """Whole texts and learnt texts of what a run trains on."""
    trainer = train(read_run(config, [*settings, "train.disable_tqdm=true"]), [])
    tokenizer, rows = trainer.processing_class, list(trainer.train_dataset)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    return texts, [tokenizer.decode([n for n in row["labels"] if n != -100]) for row in rows]


def test_conversations_take_the_models_chat_template_and_are_asked_by_it(
    jebi: Run, config: Path, chat_model: Path, talk: Path, tmp_path: Path
) -> None:
    settings = (f"model.name={chat_model}", f"data.train={talk}", "data.template=null", "data.learn=answers")
    texts, answers = learnt(config, *settings)
    assert texts == [f"<user>q{n}</s>\n<assistant>a{n}</s>\n" for n in range(3)]
    assert answers == [f"a{n}</s>" for n in range(3)]
    assert json.loads((tmp_path / "out" / "jebi_run.json").read_text())["data"]["template"] == "chat"
    words = ("--adapter", str(tmp_path / "out"), "--max-new-tokens", "2")
    assert jebi("chat", *words, stdin="q0\n").code == 0
    (tmp_path / "asked.jsonl").write_text('{"instruction": "q0"}\n')
    done = jebi("compare", *words, "--prompts", str(tmp_path / "asked.jsonl"), "--heldout", str(talk))
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["base"]["heldout_tokens"] == 3 * len("a0") + 3
    assert [answer["question"] for answer in record["answers"]] == ["q0", "q0", "q1", "q2"]


def test_conversations_without_a_chat_template_are_an_error_with_a_way_out(jebi: Run, config: Path, talk: Path) -> None:
    words = ("--set", f"data.train={talk}", "--set", "data.template=null")
    done = jebi("train", str(config), *words)
    assert done.code == 2
    assert "the tokenizer has no chat template, so conversations cannot be written: set data.template" in done.err
    assert jebi("train", str(config), "--set", f"data.train={talk}", "--set", f"data.template='{JINJA}'").code == 0


def test_sources_with_weights(config: Path, rows: Path, talk: Path) -> None:
    texts, _ = learnt(config, f"data.train=[{{source: {rows}, weight: 2}}, {talk}]")
    assert len(texts) == 2 * 3 + 3
    assert sum(text.startswith("Q: q") for text in texts) == 3


def test_a_folder_is_all_its_files(config: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        shutil.copy(rows, tmp_path / "folder" / f"{name}.jsonl")
    assert len(learnt(config, f"data.train={tmp_path / 'folder'}")[0]) == 6


def test_a_formatter_of_the_users(config: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def f(row):\n    return {'prompt': row['output'], 'completion': '!'}\n")
    texts, answers = learnt(config, f"data.formatter={tmp_path / 'own.py'}:f", "data.template=null")
    assert (texts[0], answers[0]) == ("3!</s>", "!</s>")
    texts, _ = learnt(config, 'data.formatter="{{ output }}{{ eos_token }}"', "data.template=null")
    assert texts[0] == "3</s>"
    assert json.loads((tmp_path / "out" / "jebi_run.json").read_text())["data"]["text_field"] == "text"


def test_a_stream_trains_and_does_not_hold_its_rows(config: Path, rows: Path) -> None:
    trainer = train(read_run(config, ["data.streaming=true", "train.disable_tqdm=true"]), [])
    assert not hasattr(trainer.train_dataset, "__len__")
    assert trainer.state.global_step == 2


def test_special_tokens_and_bad_rows_are_handled_as_set(jebi: Run, config: Path, talk: Path, tmp_path: Path) -> None:
    with open(talk, "a") as file:
        file.write(json.dumps({"conversations": [{"from": "human", "value": "</s>"}, {"from": "gpt", "value": "b"}]}))
        file.write('\n{"conversations": []}\n')
    done = jebi("train", str(config), "--set", f"data.train={talk}")
    assert done.code == 2
    assert "talk.jsonl': row 4 (counted from 0): the conversation is empty." in done.err
    settings = (f"data.train={talk}", "data.bad_rows=skip")
    trainer = train(read_run(config, [*settings, "train.disable_tqdm=true"]), [])
    assert [ids.count(2) for ids in trainer.train_dataset["input_ids"]] == [1, 1, 1, 1]
    trainer = train(read_run(config, [*settings, "data.special_tokens_in_text=tokens", "train.disable_tqdm=true"]), [])
    assert [ids.count(2) for ids in trainer.train_dataset["input_ids"]] == [1, 1, 1, 2]


def test_a_source_that_is_weighed_below_1_trains(jebi: Run, config: Path, rows: Path) -> None:
    done = jebi("inspect", str(config), "--set", f"data.train=[{{source: {rows}, weight: 0.5}}]", "--rows", "0")
    assert (done.code, "nothing-learnt" in done.out) == (0, False), done.err
    assert len(learnt(config, f"data.train=[{{source: {rows}, weight: 0.5}}]")[0]) == 2


def test_ready_texts_of_any_column_may_hold_control_tokens(config: Path, tmp_path: Path) -> None:
    (tmp_path / "body.jsonl").write_text("".join(json.dumps({"body": f"text {n}</s>"}) + "\n" for n in range(4)))
    settings = [f"data.train={tmp_path / 'body.jsonl'}", "data.text_field=body", "data.template=null"]
    trainer = train(read_run(config, [*settings, "train.disable_tqdm=true"]), [])
    assert trainer.data_report is not None
    assert [finding.code for finding in trainer.data_report.findings] == []


def test_a_row_is_named_by_its_number_in_the_file_where_a_share_is_held_out(
    jebi: Run, config: Path, talk: Path
) -> None:
    with open(talk, "a") as file:
        file.write('{"conversations": []}\n')
    done = jebi("inspect", str(config), "--set", f"data.train={talk}", "--set", "data.heldout_share=0.5")
    assert done.code == 2
    assert "talk.jsonl': row 3 (counted from 0): the conversation is empty." in done.err


def test_half_characters_are_told(jebi: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "half.jsonl").write_text('{"text": "whole</s>"}\n{"text": "half \\ud800</s>"}\n')
    words = ("--set", f"data.train={tmp_path / 'half.jsonl'}", "--set", "data.template=null")
    done = jebi("inspect", str(config), *words, "--set", "data.streaming=true")
    assert done.code == 2
    assert "row 1 (counted from 0): the text holds '\\ud800', which is half a character" in done.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.streaming=true", "data.heldout_share=0.5"], "data.heldout_share needs rows that can be counted"),
        (["data.text_field=text", "data.format=alpaca", "data.template=null"], "but data.format is alpaca: drop one"),
        (["data.text_field=text", "data.learn=last_answer", "data.template=null"], "needs the answers apart"),
        (["data.shuffle_buffer=0"], "data.shuffle_buffer must be at least 1, not 0"),
        (["data.bad_rows=drop"], "data.bad_rows must be one of error, skip, not 'drop'"),
        (["data.train=[]"], "data.train is missing"),
        (["data.train=[{file: a}]"], "data.train must be a file, a folder or a hub id, or a list of them"),
        (
            ["data.text_field=body", "data.template=null"],
            "rows.jsonl': data.text_field 'body' is no column. There are: ",
        ),
        (["data.streaming=true", "train.max_steps=-1"], "data.streaming needs train.max_steps"),
        (["data.roles={1: user}"], "data.roles: 1 must be a text and mean one of system, user, assistant, tool"),
        (["data.roles={narrator: usr}"], "data.roles: 'narrator' must be a text and mean one of system, user"),
        (["data.format=chatml"], "data.format 'chatml' is not known. Recognised are"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(settings: list[str], message: str, jebi: Run, config: Path) -> None:
    words = [word for setting in [*settings, "model.name=./nothing"] for word in ("--set", setting)]
    done = jebi("train", str(config), *words)
    assert done.code == 2
    assert message in done.err
