"""The Triton kernels: equal to their references when interpreted, and compiled for every card they have to run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytest.importorskip("triton")


@pytest.mark.parametrize("script", ["parity.py", "parity_decoding.py"])
def test_interpreted_kernels_equal_their_references(script: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(HERE / script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 60


def test_kernels_compile_for_every_card() -> None:
    done = subprocess.run([sys.executable, str(HERE / "compiled.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compute capability") == 7
