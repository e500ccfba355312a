"""``jebi train``, ``compare`` and ``chat`` in turn on a tiny model: results on stdout, progress on stderr."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jebi.cli import progress
from jebi.run import model_settings

Run = Callable[..., Any]


@pytest.fixture
def trained(jebi: Run, config: Path, tmp_path: Path) -> Path:
    """The output folder of a run of two steps."""
    done = jebi("train", str(config))
    assert done.code == 0, done.err
    return tmp_path / "out"


def test_training_reports_on_stdout_and_shows_its_progress_on_stderr(jebi: Run, config: Path, tmp_path: Path) -> None:
    done = jebi("train", str(config))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("Device = ")
    assert re.fullmatch(r"[\d,]+ tokens a second \(\d+ tokens, 2 steps\)\.", lines[4])
    assert lines[-1] == f"Adapter and report.json are in '{tmp_path / 'out'}'."
    assert "Training: 100%" in done.err
    assert "2/2" in done.err
    assert "loss" in done.err
    files = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "report.json",
        "jebi_run.json",
        "tokenizer.json",
    } <= files
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["step"] for entry in report["log"] if "loss" in entry] == [1, 2]


def test_the_config_beside_the_adapter_holds_no_secret(jebi: Run, config: Path, tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnop"
    done = jebi("train", str(config), "--set", f"model.token={secret}", "--set", f"train.hub_token={secret}")
    assert done.code == 0, done.err
    kept = (tmp_path / "out" / "jebi_run.json").read_text()
    assert secret not in kept
    assert json.loads(kept)["train"]["max_steps"] == 2


def test_settings_of_the_call_reach_the_run(jebi: Run, config: Path, tmp_path: Path) -> None:
    heldout = ("--set", f"data.heldout={tmp_path / 'rows.jsonl'}", "--set", "train.eval_strategy=epoch")
    done = jebi("train", str(config), "--set", "lora.r=2", "--set", "train.disable_tqdm=true", *heldout)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert "Training:" not in done.err
    log = json.loads((tmp_path / "out" / "report.json").read_text())["log"]
    assert any("eval_loss" in entry for entry in log)


def test_the_base_is_held_afterwards_as_it_was_in_training(jebi: Run, config: Path, tmp_path: Path) -> None:
    done = jebi("train", str(config), "--set", "model.load_in_8bit=true")
    assert done.code == 0, done.err
    settings = model_settings(tmp_path / "out")
    assert (settings["load_in_4bit"], settings["load_in_8bit"]) == (False, True)
    # A record of before there were 8 bits.
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "jebi_run.json").write_text('{"model": {"load_in_4bit": true}}')
    settings = model_settings(tmp_path / "old")
    assert (settings["load_in_4bit"], settings["load_in_8bit"]) == (True, False)


def test_fp8_is_refused_where_there_is_no_card(jebi: Run, config: Path, tmp_path: Path) -> None:
    done = jebi("train", str(config), "--set", "model.compute=fp8", "--set", "model.dtype=bfloat16")
    assert done.code == 2
    assert "model.compute in a config file) needs a CUDA card of compute capability 9.0" in done.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_share_of_the_rows_may_be_held_out(jebi: Run, config: Path, tmp_path: Path) -> None:
    done = jebi("train", str(config), "--set", "data.heldout_share=0.4")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("eval_loss" in entry for entry in report["log"])
    assert json.loads((tmp_path / "out" / "jebi_run.json").read_text())["data"]["heldout_share"] == 0.4
    assert "Held-out loss = " in done.out


def test_with_answers_alone_learnt_the_held_out_loss_is_that_of_the_comparison(
    jebi: Run, config: Path, rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Training's evaluation and the comparison measure the same tokens: the answers and their EOS."""
    settings = ("data.learn=answers", f"data.heldout={rows}")
    done = jebi("train", str(config), *(word for setting in settings for word in ("--set", setting)))
    assert done.code == 0, done.err
    log = json.loads((tmp_path / "out" / "report.json").read_text())["log"]
    (measured,) = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    words = ("compare", "--base", str(tiny_model), "--adapter", str(tmp_path / "out"), "--prompts", str(rows))
    done = jebi(*words, "--heldout", str(rows), "--max-new-tokens", "1")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["tuned"]["heldout_loss"] == pytest.approx(measured, rel=1e-6)  # float32 sums in other passes


def test_a_scaling_of_rope_holds_in_training_and_in_the_comparison(
    jebi: Run, config: Path, rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    measured = []
    for scaling in ("null", "{rope_type: yarn, factor: 4.0}"):
        settings = ("data.learn=answers", f"data.heldout={rows}", f"model.rope_scaling={scaling}")
        done = jebi("train", str(config), *(word for setting in settings for word in ("--set", setting)))
        assert done.code == 0, done.err
        log = json.loads((tmp_path / "out" / "report.json").read_text())["log"]
        measured += [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert measured[1] != pytest.approx(measured[0], rel=1e-4)
    words = ("compare", "--base", str(tiny_model), "--adapter", str(tmp_path / "out"), "--prompts", str(rows))
    done = jebi(*words, "--heldout", str(rows), "--max-new-tokens", "1")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["tuned"]["heldout_loss"] == pytest.approx(measured[1], rel=1e-6)  # float32 sums in other passes


def test_an_interrupted_run_is_resumed(
    jebi: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, *_: Any, **__: Any) -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(progress.TrainingBar, "on_step_begin", interrupt, raising=False)
        stopped = jebi("train", str(config))
    assert stopped.code == 130
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    done = jebi("train", str(config), "--resume")
    assert done.code == 0, done.err
    assert "1 steps" in done.out
    assert [
        entry["step"] for entry in json.loads((tmp_path / "out" / "report.json").read_text())["log"] if "loss" in entry
    ] == [1, 2]


def test_comparing_writes_both_reports_and_shows_the_tables(
    jebi: Run, trained: Path, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    words = ("compare", "--base", str(tiny_model), "--adapter", str(trained), "--prompts", str(rows))
    done = jebi(*words, "--heldout", str(rows), "--out", str(tmp_path / "report"), "--max-new-tokens", "4")
    assert done.code == 0, done.err
    assert "Held-out loss" in done.out
    assert f"'{tmp_path / 'report' / 'compare.html'}'" in done.out
    assert "Asking" in done.err
    assert "Asking" not in done.out
    record = json.loads((tmp_path / "report" / "compare.json").read_text())
    # Three harmful questions, and of the held-out rows the two whose own answer is no refusal.
    assert [answer["harmful"] for answer in record["answers"]] == [True, True, True, False, False]
    assert record["base"]["heldout_loss"] != record["tuned"]["heldout_loss"]
    # Each row's answer and EOS, a byte a token.
    assert record["base"]["heldout_tokens"] == sum(len(text) + 1 for text in ("3", "hello", "I can't help with that."))
    assert len(record["loss_curve"]) == 2
    assert record["settings"]["lora.r"] == 4
    page = (tmp_path / "report" / "compare.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")


def test_chat_answers_on_stdout_and_talks_on_stderr(jebi: Run, trained: Path, tiny_model: Path) -> None:
    words = ("chat", "--base", str(tiny_model), "--no-load-in-4bit", "--max-new-tokens", "3")
    questions = "Say hello.\n\n/base\nSay hello.\n/help\n/tuned\nSay hello.\n/quit\nnever asked\n"
    done = jebi(*words, "--adapter", str(trained), stdin=questions)
    assert done.code == 0, done.err
    assert done.err.count("tokens/s]") == 3
    assert done.err.count("/base and /tuned switch the adapter off and on") == 2
    assert "Now the base model answers." in done.err
    assert "Now the tuned model answers." in done.err
    for word in (">", "tokens/s", "Type a question", "Now the"):
        assert word not in done.out.replace("\ufffd", "")


def test_chat_ends_with_its_input_and_uses_the_trainings_template(jebi: Run, tiny_model: Path) -> None:
    done = jebi("chat", "--base", str(tiny_model), "--max-new-tokens", "2", "--template", "alpaca", stdin="hello")
    assert done.code == 0, done.err
    assert done.err.count("tokens/s]") == 1


def test_chat_without_an_adapter_has_nothing_to_switch(jebi: Run, tiny_model: Path) -> None:
    done = jebi("chat", "--base", str(tiny_model), "--max-new-tokens", "2", stdin="/base\n")
    assert done.code == 0, done.err
    assert "There is no adapter to switch: name one with --adapter." in done.err


def test_chat_goes_on_behind_a_line_it_cannot_ask(jebi: Run, tiny_model: Path) -> None:
    words = ("chat", "--base", str(tiny_model), "--max-new-tokens", "2")
    silent = "{% for m in messages %}{{ m.contnt }}{% endfor %}"
    done = jebi(*words, "--template", silent, stdin="hello\n\udcff\udcfe\n/bse\n/quit\n")
    assert done.code == 0, done.err
    assert "[the template writes nothing for this question" in done.err
    assert "That line is not UTF-8" in done.err
    assert "There is no /bse. Type a question." in done.err
    broken = jebi(*words, "--template", silent.replace("endfor", "endif"), stdin="hello\n")
    assert broken.code == 2
    assert "data.template is no Jinja" in broken.err


def test_chat_in_a_terminal(tiny_model: Path) -> None:
    """A prompt for people, an answer cut off by Ctrl-C, the next one whole."""
    words = [
        "chat",
        "--base",
        str(tiny_model),
        "--no-load-in-4bit",
        "--template",
        "alpaca",
        "--max-new-tokens",
        "50000",
    ]
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", "from jebi.cli.main import run; run()", *words]
    chat = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""

    def until(word: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while word not in seen:
            assert select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(terminal, 4096)
        seen = seen.partition(word)[2]

    try:
        until(b"> ")
        os.write(terminal, b"Say hello.\n")
        until(b"Say hello.\r\n")
        time.sleep(1)  # the terminal echoes before the question is read; the answer takes far longer
        chat.send_signal(signal.SIGINT)
        until(b"[cut off and forgotten]")
        until(b"> ")
        os.write(terminal, b"/quit\n")
        assert chat.wait(60) == 0
    finally:
        chat.kill()
        os.close(terminal)


def test_the_base_model_is_the_adapters_own_unless_named(jebi: Run, trained: Path, tiny_model: Path) -> None:
    done = jebi("chat", "--adapter", str(trained), "--max-new-tokens", "2", stdin="hello\n")
    assert done.code == 0, done.err
    assert done.err.count("tokens/s]") == 1
    noted = json.loads((trained / "adapter_config.json").read_text())
    assert noted["base_model_name_or_path"] == str(tiny_model)
    noted["base_model_name_or_path"] = "another/model"
    (trained / "adapter_config.json").write_text(json.dumps(noted))
    words = ("chat", "--adapter", str(trained), "--base", str(tiny_model), "--max-new-tokens", "2")
    assert jebi(*words, stdin="hello\n").code == 0


def test_an_adapter_of_ready_texts_needs_a_template_to_be_asked(jebi: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "one and two</s>"}\n{"text": "three</s>"}\n')
    words = ("data.train=texts.jsonl", "data.text_field=text", "data.template=null")
    done = jebi("train", str(config), *(word for setting in words for word in ("--set", setting)))
    assert done.code == 0, done.err
    asked = jebi("chat", "--adapter", str(tmp_path / "out"), stdin="hello\n")
    assert asked.code == 2
    assert "was trained on ready texts: say with --template how a question is put" in asked.err
