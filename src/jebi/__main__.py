"""``python -m jebi``."""

from jebi.cli.main import run

run()
