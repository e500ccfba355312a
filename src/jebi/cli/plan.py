"""``jebi plan MODEL``: what a training would take and how long, before a weight is loaded. No torch is imported."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jebi.config import RunConfig, read_run
from jebi.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from jebi.plan.jobs import Job
    from jebi.plan.prediction import Prediction

WIDTH = 60
"""Columns of the bar."""

_STYLES = {
    "model": "blue", "adapter": "magenta", "weights as multiplied": "cyan", "activations": "green",
    "workspace": "yellow", "allocator": "bright_black", "libraries": "white",
}  # fmt: skip

_BRIEFLY = {
    "none": "keeps all", "keep_attention": "keeps attention", "recompute": "recomputes",
    "offload": "offloads",
}  # fmt: skip
"""What layers keep, for a table of many cards."""


def command(  # noqa: PLR0913  (options of a command)
    model: Annotated[
        str, typer.Argument(help="A folder, a .gguf file, smollm2, a hub id, or a shape such as llama-3.1-8b.")
    ] = "",
    gpu: Annotated[str | None, typer.Option(help="Card: t4, rtx4090, a100-80, h100 ...; else this machine's.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory to stay within, such as 16GB.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a run, whose settings are planned with.")] = None,
    rows: Annotated[Path | None, typer.Option(help=".jsonl, .json or .csv, by whose lengths steps are timed.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    all_gpus: Annotated[bool, typer.Option("--all-gpus", help="Which known cards can run it, and how fast.")] = False,
    gpus: Annotated[int, typer.Option(min=1, help="Cards that train together, a process on each.")] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Divide the layers among them, as model.shard does.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.key=value; may be repeated.")
    ] = None,
) -> None:
    """Tell how much memory a training takes, how long, and what would be chosen; exit code 2 if it does not fit."""
    from jebi.cli.machine import device_for
    from jebi.models.sizes import read_sizes
    from jebi.plan.budget import budget_bytes
    from jebi.plan.cards import CARDS
    from jebi.plan.jobs import job_of, rows_of
    from jebi.plan.prediction import predict
    from jebi.plan.ranks import world_of

    run = _run(config, [*(set_ or ()), *(["model.shard=true"] if shard else ())])
    if run.model.shard and gpus == 1:
        raise ConfigError("layers are divided among several cards: say how many with --gpus.")
    name = model or (run.model.name if config else "")
    if not name:
        raise ConfigError("name a model, such as: jebi plan llama-3.1-8b --gpu t4; or a run's file with --config.")
    sized = read_sizes(name, run.model.token)
    device = device_for(gpu, memory)
    if gpus > 1 and device.card.name == "cpu":
        raise ConfigError("this machine has no card: name the cards' kind with --gpu, such as --gpu h100.")
    world = world_of(gpus, run.model.shard)
    job = job_of(run, sized.shape, device.bfloat16, rows or rows_of(run), world)
    host = device.host // world.here
    budget = min(device.budget, budget_bytes(run.train.get("memory_budget"), device.card.memory))
    if job.held.fp8 and device.card.fp8 is None and math.isfinite(device.card.products):
        raise ConfigError(
            f"model.compute '{run.model.compute}' is not for {device.card.name}: drop it, or plan with --gpu h100 or "
            "newer."
        )
    current = predict(job, device.card, budget, host)
    known = [card for card in CARDS.values() if card.fp8 or not job.held.fp8]
    others = [predict(job, card, card.memory, card.memory) for card in known if card.name != device.card.name]
    title = f"{name}{', its shape alone' if sized.built_in else ''}: {_settings(run, job)}"
    if json_:
        typer.echo(json.dumps(document(name, current, others if all_gpus else []), indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(title, style="bold", highlight=False)
        every = sorted([current, *others], key=lambda each: (not each.timed, each.step.seconds))
        console.print(_cards(every) if all_gpus else _table(current, others, host), highlight=False)
    if not all_gpus and not current.fits:
        raise typer.Exit(2)


def _run(config: Path | None, settings: list[str] | None) -> RunConfig:
    """The run of a file, or the tutorial's."""
    from jebi.config import run_from_dict
    from jebi.config.reading import apply_settings
    from jebi.config.train_section import names, require_names

    if config is not None:
        run = read_run(config, settings)
    else:
        tutorial = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 60}
        sections = {"data": {"train": "none"}, "train": tutorial | {"optim": "adamw_8bit"}}
        run = run_from_dict(apply_settings(sections, settings or []))
    require_names(run.train, names())
    return run


def _settings(run: RunConfig, job: "Job") -> str:
    dense = f"{8 * job.held.element}-bit"
    form = {"nf4": "4-bit", "int8": "8-bit", "dense": dense, "masters": "full fine-tuning"}[job.held.storage]
    adapter = "" if job.held.lora is None else f", LoRA r={run.lora.r}"
    rows = f"rows of {job.longest:,} tokens" if job.row is None else f"rows of about {job.row:,.0f} tokens"
    world = job.held.world
    cards = f" on each of {world.ranks} cards" if world.ranks > 1 else ""
    return f"{form}{adapter}, {rows}, {job.batch} a step{cards}"


def _table(current: "Prediction", others: list["Prediction"], host: int) -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from jebi.plan.inventory import by_part, total
    from jebi.plan.prediction import next_faster, over_more, remedies, smallest
    from jebi.plan.words import pasted

    items, world = list(current.items), current.job.held.world
    word = Text("fits", "bold green") if current.fits else Text("does not fit", "bold red")
    short = "" if current.fits else f", {_gb(max(current.missing, 1))} GB too much"
    cards = f"{world.ranks} x {current.card.name}, each" if world.ranks > 1 else current.card.name
    word.append(f" {cards}: {_gb(current.peak)} of {_gb(current.budget)} GB{short}", "default")
    bar, parts = Text(), Text()
    scale = WIDTH / max(current.peak, current.budget)
    upto = 0
    for part, size in by_part(items):
        upto += size
        bar.append("█" * (round(upto * scale) - len(bar)), _STYLES[part])
        parts.append("■ ", _STYLES[part]).append(f"{part} {_gb(size)}  ")
    bar.append("░" * max(0, WIDTH - len(bar)), "bright_black")
    table = Table.grid(padding=(0, 2))
    table.add_row("chosen" if current.fits else "at the least", chosen(current))
    if current.timed and current.fits:
        table.add_row("a step", _step(current))
        low, high = (current.job.steps * each for each in current.step.range)
        if world.ranks > 1:
            table.add_row("links", _links(current))
        table.add_row(f"{current.job.steps:,} steps", f"{_time(current.seconds)} ({_time(low)} to {_time(high)})")
    elif current.fits:
        known = current.card.name == "cpu" or math.isfinite(current.card.products)
        table.add_row("a step", "times are known of 16 bits" if known else "for times name a card with --gpu")
    table.add_row("longest row", f"{current.longest:,} tokens fit" if current.longest else "none fits")
    rows = max(1, current.rows_a_pass)
    plural = "row runs" if rows == 1 else "rows run"
    if current.fits:
        table.add_row(
            "largest batch", f"any: {rows:,} full {plural} in one pass, more in several; the gradient is the same"
        )
    table.add_row("beside", f"{_gb(total(items, 'host'))} GB of host memory, {_gb(total(items, 'disk'))} GB on disk")
    ways = [] if current.fits else remedies(current, host)
    for settings, found in ways:
        table.add_row("would fit", f"{pasted(settings)}  ({_gb(found.peak)} GB)")
    over = None if current.fits else over_more(current, host)
    if over is not None:
        count = over.job.held.world.ranks
        table.add_row("would fit", f"--gpus {count} --shard  ({_gb(over.peak)} GB on each)")
    if not (current.fits or ways or over):
        table.add_row("would fit", "no setting makes it fit: take a smaller model or a larger card")
    for name, other in (("smallest card", smallest(current, others)), ("next faster", next_faster(current, others))):
        if other is not None and (name == "smallest card" or (current.timed and current.fits)):
            speed = f": {other.tokens_per_second:,.0f} tokens/s, {_time(other.seconds)}" if other.timed else ""
            table.add_row(name, f"{other.card.name}, {_gb(other.budget)} GB{speed}")
    return Group(word, bar, parts, Text(), table)


def _cards(known: list["Prediction"]) -> "RenderableType":
    from rich.table import Table

    table = Table("card", "memory", "needs", "fits", "tokens/s", "all steps", "chosen", box=None, pad_edge=False)
    for each in known:
        speed = f"{each.tokens_per_second:,.0f}" if each.fits and each.timed else "-"
        lasts = _time(each.seconds) if each.fits and each.timed else "-"
        memory, needs = f"{_gb(each.budget)} GB", f"{_gb(each.peak)} GB"
        table.add_row(
            each.card.name, memory, needs, "[green]yes[/]" if each.fits else "[red]no[/]", speed, lasts,
            _BRIEFLY[each.plan.checkpointing] if each.fits else f"{_gb(each.missing)} GB too much",
        )  # fmt: skip
    return table


def chosen(found: "Prediction") -> str:
    """What the plan chose, in words."""
    from jebi.plan.words import words

    return words(found.plan, found.places, found.job)


def _step(found: "Prediction") -> str:
    low, high = found.step.range
    tokens = f"{found.step_tokens:,.0f} tokens in {_time(found.step.seconds)}"
    return f"{tokens} ({_time(low)} to {_time(high)}): {found.tokens_per_second:,.0f} tokens/s"


def _links(found: "Prediction") -> str:
    """What several cards send each other in a step, and what of it a step is longer by."""
    from jebi.plan.ranks import links_of

    world, step = found.job.held.world, found.step
    sent, (link, inside) = found.sent, links_of(world, found.card)
    parts = f"{sent.reduced / 1e6:,.0f} MB of gradients over {link.name}"
    if sent.gathered:
        parts += f", {sent.gathered / 1e6:,.0f} MB of weights over {inside.name} while layers are computed"
    return f"{step.links * 1e3:,.1f} ms: {parts}; {found.efficiency:.1%} of {world.ranks} single cards"


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 20 else f"{seconds:.2g} s" if seconds < 0.1 else f"{seconds:.2f} s"


def document(name: str, current: "Prediction", others: list["Prediction"]) -> dict[str, object]:
    """The same for programs; sizes in bytes, times in seconds."""
    return {"model": name, **_facts(current), "cards": [_facts(each) for each in others]}


def _facts(found: "Prediction") -> dict[str, object]:
    from dataclasses import asdict

    timed, world, sent = found.timed, found.job.held.world, found.sent
    return {
        "gpu": found.card.name, "fits": found.fits, "budget": found.budget, "peak": found.peak,
        "missing": found.missing, "items": [asdict(item) for item in found.items],
        "plan": {
            "checkpointing": found.plan.checkpointing, "pass_tokens": found.plan.tokens, "chunk": found.plan.chunk,
            "keep_weights": found.plan.keep_weights, "kept_layers": found.plan.kept_layers,
            "shipped_layers": found.plan.shipped_layers, **asdict(found.places),
        },
        "ranks": world.ranks, "shares": world.shares, "gradients_sent": sent.reduced, "weights_sent": sent.gathered,
        "links_seconds": found.step.links if timed else None, "efficiency": found.efficiency if timed else None,
        "step_tokens": found.step_tokens, "step_seconds": found.step.seconds if timed else None,
        "step_seconds_range": found.step.range if timed else None, "steps": found.job.steps,
        "seconds": found.seconds if timed else None,
        "tokens_per_second": found.tokens_per_second if timed else None, "longest_row": found.longest,
        "rows_a_pass": found.rows_a_pass,
    }  # fmt: skip
