"""``jebi inspect``: rows as tokens, lengths, steps and findings, from a tokenizer and a config alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jebi.cli.token_view import pieces

Run = Callable[..., Any]


def plain(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def test_it_shows_rows_lengths_steps_and_that_nothing_is_wrong(jebi: Run, config: Path) -> None:
    done = jebi("inspect", str(config), "--set", "data.learn=answers")
    assert done.code == 0, done.err
    assert "⟦learnt⟧" in done.out
    assert "Q:·Say·hello.·↵\nA:·⟦hello‹</s>›⟧" in done.out, "marks say what colours say"
    assert re.search(r"row 0, \d+ tokens", done.out)
    assert "max_seq_length 128" in done.out
    assert re.search(r"learnt +32 \(", done.out), "three answers and their EOS"
    assert "2 of 2 (max_steps), 1.0 epochs" in done.out
    assert "none: 3 rows checked." in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 80
    assert "\x1b" not in done.out, "no colours where nobody sees them"


def test_in_a_fresh_process_libraries_say_nothing_beside(config: Path) -> None:
    """Some speak while they are imported, which another test may have made them do before."""
    command = [sys.executable, "-m", "jebi", "inspect", str(config)]
    quiet = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=config.parent, env=quiet)
    assert done.stderr == ""


def test_no_weights_are_read(jebi: Run, config: Path, tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    done = jebi("inspect", str(config), "--set", f"model.name={bare}", "--rows", "1")
    assert done.code == 0, done.err
    assert "row 0" in done.out
    assert "row 1" not in done.out


def test_a_tokenizer_of_another_model_is_a_mistake(jebi: Run, config: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Its tokens are not the model's; a card would end the process at the first of them."""
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 50}))
    done = jebi("inspect", str(config), "--set", f"model.name={other}")
    assert done.code == 2
    assert "but the model's are 0 to 49" in plain(done.err)


@pytest.fixture
def endless(tmp_path: Path) -> tuple[str, ...]:
    """Settings that make a run of ready texts without EOS."""
    lines = [json.dumps({"text": f"text number {number}"}) + "\n" for number in range(4)]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    settings = (f"data.train={tmp_path / 'texts.jsonl'}", "data.text_field=text", "data.template=null")
    return tuple(word for setting in settings for word in ("--set", setting))


def test_a_finding_that_stops_ends_with_2_unless_it_is_allowed(
    jebi: Run, config: Path, endless: tuple[str, ...]
) -> None:
    done = jebi("inspect", str(config), *endless)
    assert done.code == 2
    assert "stops missing-eos: 4 of 4 rows (rows 0, 1, 2, 3) do not end" in plain(done.out)
    (line,) = done.err.splitlines()
    assert line.startswith("jebi: the rows are not worth training on. missing-eos")
    for words in (("--allow", "missing-eos"), ("--set", "data.allow=[missing-eos]")):
        allowed = jebi("inspect", str(config), *endless, *words)
        assert allowed.code == 0, allowed.err
        assert "allowed missing-eos: 4 of 4" in plain(allowed.out)


def test_training_stops_for_the_same_and_may_be_told_not_to(
    jebi: Run, config: Path, endless: tuple[str, ...], tmp_path: Path
) -> None:
    done = jebi("train", str(config), *endless)
    assert done.code == 2
    assert "missing-eos: 4 of 4 rows" in done.err
    assert "Training" not in done.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    allowed = jebi("train", str(config), *endless, "--allow", "missing-eos")
    assert allowed.code == 0, allowed.err
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_unknown_code_is_a_mistake(jebi: Run, config: Path) -> None:
    done = jebi("inspect", str(config), "--allow", "leaks")
    assert done.code == 2
    assert "'leaks' is no code of the check. Did you mean 'leak'?" in done.err


def test_rows_beyond_the_length_are_counted_and_may_be_split_or_refused(jebi: Run, config: Path) -> None:
    short = ("--set", "model.max_seq_length=24")
    cut = jebi("inspect", str(config), *short)
    assert "longer than 24 1 (33.3%): cut, their end is lost" in plain(cut.out)
    assert "warns rows-cut: 1 of 3 rows" in plain(cut.out)
    assert re.search(r"tokens an epoch +66 ", cut.out)
    assert cut.out.index("max_seq_length 24") < cut.out.index("25 to")
    split = jebi("inspect", str(config), *short, "--set", "data.long=split", "--set", "data.overlap=4")
    assert "split into pieces" in split.out
    assert "rows-cut" not in split.out
    refused = jebi("inspect", str(config), *short, "--set", "data.long=refuse")
    assert refused.code == 2
    assert "row 2 has 44 tokens" in refused.err
    mistaken = jebi("inspect", str(config), *short, "--set", "data.overlap=4")
    assert "data.overlap does nothing with data.long cut: set data.long to split" in mistaken.err


def test_a_wrong_encoding_is_found_and_repaired_where_asked(jebi: Run, config: Path, rows: Path) -> None:
    damaged = {"instruction": "Say café.".encode().decode("cp1252"), "input": "", "output": "café"}
    rows.write_text(rows.read_text() + json.dumps(damaged) + "\n")
    found = jebi("inspect", str(config), "--rows", "0")
    assert "mojibake: 1 of 4 rows (row 3)" in plain(found.out)
    repaired = jebi("inspect", str(config), "--rows", "4", "--set", "data.repair_encoding=true")
    assert "mojibake" not in repaired.out
    assert "Say·café." in repaired.out
    assert "Ã" not in repaired.out


def test_held_out_rows_that_are_trained_on_are_told(jebi: Run, config: Path, rows: Path) -> None:
    done = jebi("inspect", str(config), "--set", f"data.heldout={rows}")
    assert "warns leak: 3 of 3 rows" in plain(done.out)


def test_what_is_shown_is_saved_as_a_picture_and_as_a_page(jebi: Run, config: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "pictures" / name for name in ("a.svg", "a.html", "b.svg")]
    assert jebi("inspect", str(config), "--svg", str(paths[0]), "--html", str(paths[1])).code == 0
    assert jebi("inspect", str(config), "--svg", str(paths[2])).code == 0
    svg, html, again = (path.read_text(encoding="utf-8") for path in paths)
    assert svg.startswith("<svg")
    assert html.startswith("<!DOCTYPE html>")
    assert svg == again, "nothing in it is drawn by chance"
    for text in (svg, html):
        assert "max_seq_length" in text
        assert not re.search(r"(src|url)[=(]['\"]?http", text), "nothing is loaded from elsewhere"


@pytest.mark.parametrize("text", ["한글 and ascii", "🙂", "a\n b", "é" * 3])
def test_tokens_of_bytes_are_shown_as_whole_characters(text: str, byte_tokenizer: Run) -> None:
    tokenizer = byte_tokenizer(False)
    made = list(pieces(tokenizer, tokenizer(text)["input_ids"]))
    assert made == [(character, len(character.encode())) for character in text]


def test_bytes_that_are_no_character_do_not_swallow_the_rest(byte_tokenizer: Run) -> None:
    tokenizer = byte_tokenizer(False)
    (first, *_) = tokenizer("한")["input_ids"]
    made = list(pieces(tokenizer, [first, *tokenizer("abcdef")["input_ids"]]))
    assert "".join(text for text, _ in made) == "\ufffdabcdef"
    assert sum(count for _, count in made) == 7


def test_of_a_stream_the_first_rows_are_shown(jebi: Run, config: Path) -> None:
    done = jebi("inspect", str(config), "--set", "data.streaming=true", "--set", "data.packing=true")
    assert done.code == 0, done.err
    assert "2 of 2 (max_steps)\n" in "\n".join(line.rstrip() + "\n" for line in done.out.splitlines())
    assert "The rows are streamed: the first 1,000 were checked." in done.out


def test_a_picture_that_cannot_be_written_is_told(jebi: Run, config: Path, tmp_path: Path) -> None:
    for form in ("svg", "html"):
        done = jebi("inspect", str(config), f"--{form}", str(tmp_path))
        assert done.code == 2
        assert (
            done.err.splitlines()[-1] == f"jebi: --{form} '{tmp_path}' cannot be written: Is a directory. Name another."
        )
