"""The ``jebi`` command: its list of commands, and how errors end.

A user's mistake is one line on stderr and exit code 2, Ctrl-C is 130; anything else is a bug and shows a traceback.
"""

import logging
import os
import sys

import typer

from jebi.cli import bench, chat, compare, demo, inspect, models, plan, train, version
from jebi.config import launched
from jebi.errors import JebiError

INTERRUPTED = 130
"""What typer ends with after Ctrl-C, as shells expect."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("demo")(demo.command)
app.command("plan")(plan.command)
app.command("train")(train.command)
app.command("inspect")(inspect.command)
app.command("chat")(chat.command)
app.command("compare")(compare.command)
app.command("models")(models.command)
app.command("version")(version.command)
app.add_typer(bench.app, name="bench")


@app.callback()
def about() -> None:
    """jebi fine-tunes large language models on one GPU, or on none."""


def run() -> None:
    """Entry point of the ``jebi`` script and of ``python -m jebi``."""
    # Notices of libraries that a newcomer can do nothing about; jebi's own stay.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes, which transformers imports by way of peft, advises to install a package with yet another kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Of several processes the first one speaks; of errors all do, by number.
    level = logging.WARNING if launched.rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    name = "jebi" if launched.ranks() == 1 else f"jebi (process {launched.rank()})"
    if launched.rank() == 0:
        # What a training will take is told as it begins.
        logging.getLogger("jebi.training.planning").setLevel(logging.INFO)
    try:
        app()
    except JebiError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print(f"{name}: stopped by Ctrl-C", file=sys.stderr)
        raise
