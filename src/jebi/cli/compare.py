"""``jebi compare``: base and tuned side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from jebi.imports import uncollected

SHOWN = 6
"""Answers shown in the terminal, from all over the list; all of them are on the page."""


def command(
    adapter: Annotated[Path, typer.Option(help="Folder that a training wrote.")],
    prompts: Annotated[Path, typer.Option(help="Harmful questions: .jsonl with 'instruction', perhaps 'input'.")],
    base: Annotated[str | None, typer.Option(help="The base model; the one that the adapter names by default.")] = None,
    heldout: Annotated[Path | None, typer.Option(help="Rows never trained on: instruction, input, output.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; the adapter's by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 64,
    template: Annotated[str | None, typer.Option(help="tutorial, alpaca or a text; the training's by default.")] = None,
) -> None:
    """Ask the base model and the tuned one the same questions, and write a report."""
    compare_and_show(base, adapter, prompts, heldout, out or adapter, max_new_tokens, template)


def compare_and_show(
    base: str | None,
    adapter: Path,
    prompts: Path,
    heldout: Path | None,
    out: Path,
    max_new_tokens: int,
    template: str | None = None,
) -> None:
    """Compare and print the tables; the page and the JSON are in ``out``."""
    from rich.console import Console

    with uncollected():
        from jebi.inference.comparison import answers_table, table
        from jebi.run import compare

    comparison = compare(base, adapter, prompts, heldout, out, max_new_tokens, template)
    console = Console()
    step = max(1, len(comparison.answers) // SHOWN)
    console.print(answers_table(replace(comparison, answers=comparison.answers[::step]), SHOWN))
    console.print(table(comparison))
    typer.echo(f"All answers: '{out / 'compare.html'}' (open it in a browser), '{out / 'compare.json'}'.")
