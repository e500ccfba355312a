"""Scaling on paper: what `docs/scaling.md` shows between its marks, computed by `jebi.plan.ranks`.

python benchmarks/scaling_table.py            prints it
python benchmarks/scaling_table.py --write    puts it into the page
"""

import argparse
from pathlib import Path

from transformers import LlamaConfig

from jebi.models.families import DecoderShape, read_config
from jebi.plan.ranks import (
    Link,
    StepBytes,
    adapter_values,
    efficiency,
    layer_bytes,
    maps_of,
    rank_bytes,
    step_bytes,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
MARKS = "<!-- computed by benchmarks/scaling_table.py -->", "<!-- end -->"

NVLINK = Link("NVLink 4", 450e9, 5e-6)
PCIE = Link("PCIe 5.0 x16", 64e9, 10e-6)
NETWORK = Link("100 Gbit/s", 12.5e9, 20e-6)
"""What their makers say of each direction; delays of NCCL's rings as usually measured."""
CARDS = 8
"""Of a machine; beyond that the network is between them, one adapter a machine."""
REACHED = 0.75
"""Share of a link's rate that large messages reach."""
RANK, ELEMENT, PASS = 16, 2, 8192
COUNTS = (2, 8, 16, 64)

RATES = {"full": 17_088, "chat": 14_315}
"""Tokens a second of Llama 3.1 8B's shape in 4 bits on one H200 (docs/benchmarks/h200.md)."""
TOKENS = {"full": 8 * 2048, "chat": 1800}
"""Of a step's rows in each process: 8 of 2,048 tokens, and 8 of chat."""
RECOMPUTING = 12_200 / 16_500
"""Speed where everything is recomputed over that where it is kept, 8B on an H100: 70B keeps nothing."""


def llama(layers: int, width: int, ffn: int, heads: int) -> DecoderShape:
    """A decoder of the Llama 3.1 family."""
    sizes = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False
    )
    return read_config(config)


SHAPES = {"8B": llama(32, 4096, 14336, 32), "70B": llama(80, 8192, 28672, 64)}


def values(shape: DecoderShape) -> int:
    """Numbers that every token is multiplied with in the layers."""
    return sum(inputs * outputs for layer in shape.layers for inputs, outputs in maps_of(layer))


def seconds(name: str, rows: str) -> float:
    """Of a step on one card: as measured for 8B, by its multiplications for 70B."""
    rate = RATES[rows]
    if name == "70B":
        rate = rate * values(SHAPES["8B"]) / values(SHAPES["70B"]) * RECOMPUTING
    return TOKENS[rows] / rate


def sent(name: str, rows: str, ranks: int, shard: bool) -> StepBytes:
    """By each process in a step."""
    shape = SHAPES[name]
    divided = layer_bytes(shape, "nf4", ELEMENT) * len(shape.layers) if shard else 0
    return step_bytes(adapter_values(shape, RANK), divided, ranks, min(ranks, CARDS), -(-TOKENS[rows] // PASS))


def reached(link: Link) -> Link:
    """What large messages get of it."""
    return Link(link.name, REACHED * link.bytes_s, link.delay_s)


CASES = (("8B", "full", False), ("8B", "chat", False), ("70B", "full", True), ("70B", "chat", True))


def held() -> list[str]:
    """What a process holds."""
    made = [
        "| model | trained numbers | frozen layers, 4 bits | GiB a process, whole | divided by 2 | by 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        frozen = layer_bytes(shape, "nf4", ELEMENT) * len(shape.layers) / 2**30
        each = [rank_bytes(shape, "nf4", ELEMENT, RANK, ranks, ranks > 1).total / 2**30 for ranks in (1, 2, CARDS)]
        cells = [f"{adapter_values(shape, RANK) / 1e6:.1f} million", f"{frozen:.1f} GiB"]
        made.append(f"| {name} | {' | '.join(cells + [f'{gib:.1f}' for gib in each])} |")
    return made


def travelling() -> list[str]:
    """What a process sends in a step, of eight."""
    made = [
        f"| model, rows | step on one card, ms | gradients, MB | ms: {NVLINK.name} | {PCIE.name} | {NETWORK.name} "
        f"| weights, MB | ms: {NVLINK.name} | {PCIE.name} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows, shard in CASES:
        step = sent(name, rows, CARDS, shard)
        cells = [f"{seconds(name, rows) * 1e3:,.0f}", f"{step.reduced / 1e6:,.0f}"]
        cells += [f"{step.reduced / reached(link).bytes_s * 1e3:,.1f}" for link in (NVLINK, PCIE, NETWORK)]
        cells.append(f"{step.gathered / 1e6:,.0f}" if shard else "")
        cells += [f"{step.gathered / reached(link).bytes_s * 1e3:,.0f}" if shard else "" for link in (NVLINK, PCIE)]
        made.append(f"| {name}, {rows} | {' | '.join(cells)} |")
    return made


def predicted() -> list[str]:
    """Efficiency by processes."""
    made = ["| model, rows | within a machine | " + " | ".join(f"{n} processes" for n in COUNTS) + " |"]
    made.append("|---" * (2 + len(COUNTS)) + "|")
    for name, rows, shard in CASES:
        for inside in (NVLINK, PCIE):
            shares = []
            for ranks in COUNTS:
                link = inside if ranks <= CARDS else NETWORK
                step = sent(name, rows, ranks, shard)
                shares.append(efficiency(seconds(name, rows), step, ranks, reached(link), reached(inside)))
            made.append(f"| {name}, {rows} | {inside.name} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return made


def lines() -> list[str]:
    """The page's tables."""
    return [*held(), "", *travelling(), "", *predicted()]


def main() -> None:
    """Print the tables, or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    text = "\n".join(lines())
    if not parser.parse_args().write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
