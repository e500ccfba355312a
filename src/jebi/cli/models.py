"""``jebi models``: which families are supported, and how each was checked."""

import typer


def command() -> None:
    """List the supported model types, and the largest difference from transformers that was measured for each."""
    from rich.console import Console
    from rich.table import Table

    from jebi.models.compatibility import checked
    from jebi.models.families import FAMILIES

    table = Table(title="Models that jebi trains", title_justify="left")
    for column in ("model_type", "models", "logits", "gradients", "4 bits", "generation"):
        table.add_column(column)
    results = checked()
    for name, family in FAMILIES.items():
        mine = [entry.cells for entry in results if entry.model_type == name]
        worst = (max(float(cells[column]) for cells in mine) for column in ("logits", "gradients", "4 bits"))
        table.add_row(name, family.models, *(f"{value:.0e}" for value in worst), "equal")
    Console().print(table)
    typer.echo(
        "Largest difference from transformers, PEFT and bitsandbytes on tiny random checkpoints in float32, as a\n"
        "share of the largest value; generation token for token. docs/compatibility.md has every checkpoint."
    )
