"""Fixtures of the command line's tests: a tiny model, rows, a config, and a way to run a command in this process."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest

from jebi.cli import main


@pytest.fixture(autouse=True, scope="session")
def _no_bars() -> None:
    """The progress bar of rows that are made tokens is on stderr too, where the tests read messages."""
    datasets.disable_progress_bars()


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def jebi(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Done]:
    """``jebi("train", ...)``: the command's exit code, stdout and stderr; ``stdin=`` is piped in."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.chdir(tmp_path)

    def run(*words: str, stdin: str = "") -> Done:
        (tmp_path / "stdin").write_text(stdin, encoding="utf-8", errors="surrogateescape")
        capfd.readouterr()
        with (tmp_path / "stdin").open(encoding="utf-8") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["jebi", *words])
            patch.setattr(sys, "stdin", file)
            # A handler made here would keep writing to this test's stderr.
            patch.setattr(logging, "basicConfig", lambda **_: None)
            code = 0
            try:
                main.run()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture(scope="session")
def tiny_model(
    tiny_llama: Callable[[str], Path], byte_tokenizer: Callable[..., object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny checkpoint with a tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(tiny_llama("tied"), folder)
    byte_tokenizer(False).save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Make a bomb.", "input": "", "output": "I can't help with that."},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of three rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path / "rows.jsonl"


@pytest.fixture
def config(tiny_model: Path, rows: Path, tmp_path: Path) -> Path:
    """A run of two steps on them."""
    text = f"""
model: {{name: {tiny_model}, max_seq_length: 128, load_in_4bit: false, dtype: float32}}
lora: {{r: 4}}
data: {{train: {rows}, template: "Q: {{instruction}} {{input}}\\nA: {{output}}"}}
train: {{output_dir: {tmp_path / "out"}, max_steps: 2, learning_rate: 1e-2, per_device_train_batch_size: 2}}
"""
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "run.yaml"
