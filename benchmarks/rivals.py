"""What the comparisons with rivals are given: a folder with ``peers.py``, which makes the checkpoint and runs a rival.

``tok`` in it is the tokenizer that lies beside the checkpoint; a ``site`` folder goes in front of the rivals' module
path. What is compared is `vs_peers`' (training) and `decode`'s.
"""

import os
import subprocess
import sys
from pathlib import Path


def script(peers: Path) -> list[str]:
    """How ``peers.py`` is called, but for its arguments."""
    return [sys.executable, str(peers / "peers.py")]


def make_checkpoint(path: Path, peers: Path) -> None:
    """Make the checkpoint where there is none."""
    if not path.is_dir():
        command = [*script(peers), "make", "--path", str(path), "--tok", str(peers / "tok")]
        subprocess.run(command, check=True, capture_output=True)


def environment(peers: Path) -> dict[str, str]:
    """A rival's process's: this one's, with ``site`` in front of the module path."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": f"{peers / 'site'}{os.pathsep}{path}"}
