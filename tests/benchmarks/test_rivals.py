"""The rivals' folder: its script makes the checkpoint once, and its packages come first for them."""

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rivals() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "rivals.py"))


def test_the_checkpoint_is_made_where_there_is_none(rivals: dict[str, Any], tmp_path: Path) -> None:
    script = "import pathlib, sys\npathlib.Path(sys.argv[3]).mkdir()\n(pathlib.Path(sys.argv[3]) / 'said').write_text("
    (tmp_path / "peers.py").write_text(script + "' '.join(sys.argv[1:]))\n")
    made = tmp_path / "made"
    rivals["make_checkpoint"](made, tmp_path)
    assert (made / "said").read_text() == f"make --path {made} --tok {tmp_path / 'tok'}"
    (tmp_path / "peers.py").unlink()
    rivals["make_checkpoint"](made, tmp_path)


def test_their_packages_come_first(rivals: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/before")
    found = rivals["environment"](tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), "/before"]
    assert found.keys() == os.environ.keys()
