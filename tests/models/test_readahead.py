"""``models.readahead``: the files that the loader will open, in its order; nothing is an error; nothing heavy loads."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jebi.models import readahead
from jebi.models.files import Folder


def test_files_are_the_loaders(tmp_path: Path, tiny_llama) -> None:
    folder = tiny_llama()
    assert readahead.weight_files(str(folder)) == [next(Folder(folder).tensors()).file]
    for name in ("b.safetensors", "a.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"x")
    assert readahead.weight_files(str(tmp_path)) == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert readahead.weight_files(str(tmp_path / "model.gguf")) == [tmp_path / "model.gguf"]


@pytest.mark.parametrize("name", ["smollm2", "/nowhere", "/nowhere.gguf", "owner/name", "-/:", "a/b/c", ""])
def test_what_is_not_there_is_nothing_to_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert readahead.begin(name) is None


def test_a_model_of_the_hub_is_read_where_it_was_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert readahead.weight_files("owner/name") == [snapshot / "model.safetensors"]


def test_it_reads_in_a_thread_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"a": 5, "b": 0, "c": 12}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(size))
    monkeypatch.setattr(readahead, "_STEP", 4)
    files = readahead.weight_files(str(tmp_path))
    assert readahead._read(files, 100) == 17
    assert readahead._read(files, 6) == 5 + 4  # to the end of a step
    assert readahead._read([files[0], tmp_path / "gone.safetensors", files[2]], 100) == 5
    rooms: list[int] = []
    monkeypatch.setattr(readahead, "_read", lambda _, room: rooms.append(room))
    thread = readahead.begin(str(tmp_path))
    assert thread is not None
    assert thread.daemon  # it must not keep a process that has ended with an error
    thread.join()
    (room,) = rooms
    assert 0 < room < psutil.virtual_memory().total / 2


def test_jebi_train_reads_before_it_imports_anything_heavy() -> None:
    code = """
import sys
from pathlib import Path
from jebi.cli import train
from jebi.models import readahead
heavy = ("torch", "transformers", "datasets", "numpy")
readahead.begin = lambda name: (print(name, [each for each in heavy if each in sys.modules]), sys.exit())
train.command(Path("examples/demo.yaml"))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "smollm2 []\n"
