"""``jebi inspect CONFIG.yaml``: what a training would see, before anything is trained or any weight is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jebi.config import read_run
from jebi.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from jebi.inspection import Inspection

WIDTH = 80
"""Columns of saved pictures and pages."""

BARS = 10
"""Lines of the histogram."""


def command(
    config: Annotated[Path, typer.Argument(help="YAML file with sections model, lora, data and train.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows to show as tokens.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Save what is shown as a page.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Save what is shown as a picture.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Code that shall not stop; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Show a config's rows as tokens, their lengths, and what is wrong with them; exit code 2 if that would stop."""
    from rich.console import Console

    from jebi.inspection import inspect

    run = read_run(config, set_)
    run.data.allow += allow or []
    inspection = inspect(run)
    _show(Console(), inspection, rows)
    for path, form in ((html, "html"), (svg, "svg")):
        if path is not None:
            try:
                _save(path, form, inspection, rows, f"jebi inspect {config}")
            except OSError as error:
                raise ConfigError(f"--{form} '{path}' cannot be written: {error.strerror}. Name another.") from error
    inspection.report.require(run.data.allow)


def _save(path: Path, form: str, inspection: "Inspection", rows: int, title: str) -> None:
    import io
    import re

    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    _show(console, inspection, rows)
    if form == "html":
        console.save_html(str(path))
        return
    # rich would have the picture load fonts from the network, and name its parts by chance.
    page = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(path), title=title, code_format=page, unique_id="jebi")


def _show(console: "Console", inspection: "Inspection", rows: int) -> None:
    from rich.text import Text

    from jebi.cli.token_view import legend, shown_row

    flat = inspection.rows
    if rows:
        console.print(legend())
    for row in range(min(rows, len(flat))):
        begin, end = flat.starts[row], flat.starts[row + 1]
        console.print(Text(f"\nrow {flat.numbers[row]}, {end - begin:,} tokens", "bold"))
        console.print(
            shown_row(inspection.tokenizer, flat.ids[begin:end].tolist(), flat.labels[begin:end].tolist()),
            soft_wrap=False,
        )
    console.print(Text("\nTokens a row", "bold"))
    console.print(_histogram(inspection))
    console.print(_numbers(inspection))
    console.print(Text("\nFindings", "bold"))
    for finding in inspection.report.findings:
        allowed = finding.code in inspection.allowed
        mark, style = ("allowed", "dim") if allowed else ("stops", "bold red") if finding.stops else ("warns", "yellow")
        console.print(Text(f"{mark:8}", style).append(finding.line(), "default"), soft_wrap=False)
    if not inspection.report.findings:
        console.print("none: " + f"{inspection.report.rows:,} rows checked.", style="green")
    if inspection.report.note:
        console.print(inspection.report.note)


def _histogram(inspection: "Inspection") -> "RenderableType":
    """How many rows have how many tokens, with a line where ``max_seq_length`` is."""
    import numpy as np
    from rich.text import Text

    lengths, longest = inspection.lengths, inspection.longest
    top = int(lengths.max())
    step = _round_up(-(-max(top, 1) // BARS))
    edges = sorted({*range(0, top + step, step), *([longest] if longest < top else [])})
    counts, _ = np.histogram(lengths - 1, edges)  # a row of exactly max_seq_length is not cut
    text = Text()
    for begin, end, count in zip(edges, edges[1:], counts):
        if begin == longest:
            text.append(f"{'─' * 12} max_seq_length {longest:,} {'─' * 12}\n", "bold red")
        bar = "█" * -(-int(count) * 40 // max(int(counts.max()), 1))
        text.append(f"{begin + 1:>6,} to {end:>6,} ").append(bar, "red" if begin >= longest else "cyan")
        text.append(f" {count:,}\n")
    if longest >= top:
        text.append(f"{'─' * 12} max_seq_length {longest:,} {'─' * 12}\n", "dim")
    return text


def _round_up(step: int) -> int:
    """To 1, 2 or 5 with noughts."""
    size = 10 ** (len(str(step)) - 1)
    nearest: int = next(size * digit for digit in (1, 2, 5, 10) if size * digit >= step)
    return nearest


def _numbers(inspection: "Inspection") -> "RenderableType":
    from rich.table import Table

    rows, longest = inspection.rows, inspection.longest
    beyond = int((inspection.lengths > longest).sum())
    learnt, tokens = int(rows.learnt.sum()), len(rows.ids)
    table = Table.grid(padding=(0, 2))
    table.add_row("rows", f"{len(inspection.lengths):,}")
    share = f" ({beyond / len(inspection.lengths):.1%}): {_DONE[inspection.long]}" if beyond else ""
    table.add_row(f"longer than {longest:,}", f"{beyond:,}{share}")
    table.add_row("tokens an epoch", f"{tokens:,}")
    table.add_row("learnt", f"{learnt:,} ({learnt / max(tokens, 1):.1%})")
    table.add_row("steps", inspection.steps)
    return table


_DONE = {"cut": "cut, their end is lost", "split": "split into pieces", "refuse": "refused"}
