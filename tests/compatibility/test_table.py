"""The table of compatibility that is shipped: complete, within the bar, and what the page shows."""

import subprocess
import sys
from pathlib import Path

from jebi.models.compatibility import COLUMNS, checked
from jebi.models.families import FAMILIES

HERE = Path(__file__).resolve().parent


def test_every_family_and_column_is_there() -> None:
    assert {entry.model_type for entry in checked()} == set(FAMILIES)
    for entry in checked():
        assert set(entry.cells) == set(COLUMNS), entry.name
        assert all(isinstance(value, str) or value < 1e-4 for value in entry.cells.values()), entry.name


def test_every_checkpoint_of_the_tests_is_there(checkpoint_names: list[str]) -> None:
    assert sorted(entry.name for entry in checked()) == sorted(checkpoint_names)


def test_the_page_shows_the_table() -> None:
    subprocess.run([sys.executable, str(HERE / "write_table.py"), "--check"], check=True)
