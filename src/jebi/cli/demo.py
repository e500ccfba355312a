"""``jebi demo``: the whole job on the embedded model and the project's own rows."""

from pathlib import Path
from typing import Annotated

import typer

from jebi.cli.compare import compare_and_show
from jebi.cli.train import train_and_report
from jebi.config import read_run
from jebi.errors import ConfigError


def command(
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path("outputs/demo"),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Fine-tune a small model on Korean and English rows and show what changed; about 5 minutes on 2 cores."""
    examples = find_examples()
    data = examples / "data"
    run = read_run(examples / "demo.yaml", set_)
    run.data.train = str(data / "train.jsonl")
    run.train["output_dir"] = str(out)
    typer.echo(f"Fine-tuning {run.model.name} on {run.data.train} ...", err=True)
    adapter = train_and_report(run)
    typer.echo("Asking the base model and the tuned one the same questions ...", err=True)
    compare_and_show(run.model.name, adapter, data / "harmful.jsonl", data / "heldout.jsonl", adapter, 48)


def find_examples() -> Path:
    """The examples of this checkout, or of the folder one stands in."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (root / "examples" / "demo.yaml").is_file():
            return root / "examples"
    raise ConfigError("the demo's rows are in jebi's repository, folder examples/: run it from a clone of it.")
