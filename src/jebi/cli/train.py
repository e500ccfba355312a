"""``jebi train CONFIG.yaml``: one run from its config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jebi.config import RunConfig, launched, read_run
from jebi.imports import uncollected
from jebi.models import readahead


def command(
    config: Annotated[Path, typer.Argument(help="YAML file with sections model, lora, data and train.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    allow: Annotated[
        list[str] | None, typer.Option(help="Code of the check that shall not stop; may be repeated.")
    ] = None,
) -> None:
    """Fine-tune a model as a config file says."""
    train_and_report(read_run(config, set_), resume, allow or [])


def train_and_report(run_config: RunConfig, resume: bool = False, allow: Sequence[str] = ()) -> Path:
    """Train with a bar on stderr and print the memory and time report; returns the output folder."""
    readahead.begin(run_config.model.name)
    with uncollected():
        from jebi.cli.progress import TrainingBar
        from jebi.run import train

    run_config.data.allow += allow
    try:
        trainer = train(run_config, [TrainingBar()], resume)
    except KeyboardInterrupt:
        if launched.rank() == 0:
            typer.echo("Stopped. The step under way is saved as a checkpoint; --resume goes on from it.", err=True)
        raise
    output = Path(str(trainer.args.output_dir))
    assert trainer.report is not None
    if launched.rank() > 0:
        return output
    typer.echo(trainer.report.text())
    if losses := [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]:
        typer.echo(f"Held-out loss = {losses[-1]:.4f}.")
    typer.echo(f"Adapter and report.json are in '{output}'.")
    return output
