"""``jebi bench device``: what the present card or processor reaches, measured and kept for `jebi plan` to read."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jebi.plan.measured import Rates

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def about() -> None:
    """Measure this machine."""


@app.command("device")
def device(
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    keep_: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep it for plans to read.")] = True,
) -> None:
    """Measure the card, or without one the processor: products, attention, memory, bus; some seconds."""
    from jebi.models.device import default_device
    from jebi.plan.measured import keep
    from jebi.training.rates import measure

    rates = measure(default_device())
    path = keep(rates) if keep_ else None
    if json_:
        from dataclasses import asdict

        typer.echo(json.dumps(asdict(rates), indent=2))
    else:
        typer.echo("\n".join(lines(rates)))
    if path is not None:
        typer.echo(f"Kept in '{path}'; plans and predictions on this device use it from now on.", err=True)


def lines(rates: "Rates") -> list[str]:
    """What was measured, one line each."""
    found = [("products", rates.products, "TFLOP/s", rates.dtype)]
    if rates.fp8 is not None:
        found.append(("products", rates.fp8, "TFLOP/s", "8-bit floats, scaled by rows"))
    found.append(("attention", rates.attention, "TFLOP/s", "forward and backward, rows of 2,048 tokens"))
    found.append(("memory", rates.bandwidth, "GB/s", "read and written by a copy"))
    if rates.to_device is not None and rates.from_device is not None:
        found += [("bus", rates.to_device, "GB/s", "from pinned host memory")]
        found += [("bus", rates.from_device, "GB/s", "into pinned host memory")]
    head = f"{rates.device}, torch {rates.torch}, in {rates.seconds:.1f} s"
    return [head, *(f"  {name:10s} {_scaled(rate, unit)}  {what}" for name, rate, unit, what in found)]


def _scaled(rate: float, unit: str) -> str:
    scaled = rate / (1e12 if unit == "TFLOP/s" else 1e9)
    return f"{scaled:9,.1f} {unit}" if scaled >= 10 else f"{scaled:9.2f} {unit}"
