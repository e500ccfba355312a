"""Scaling on paper: what `docs/scaling.md` shows between its marks, computed by `jebi.plan.ranks`.

python benchmarks/scaling_table.py            prints it
python benchmarks/scaling_table.py --write    puts it into the page
"""

import argparse
from dataclasses import replace
from pathlib import Path

from transformers import LlamaConfig

from jebi.config import LoraConfig
from jebi.models.families import DecoderShape, read_config
from jebi.plan.cards import CARDS, REACHED
from jebi.plan.held import Held
from jebi.plan.inventory import adapter_items, model_items, total
from jebi.plan.ranks import MACHINES, NETWORK, Link, StepBytes, efficiency, links_of, step_bytes, waiting, world_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
MARKS = "<!-- computed by benchmarks/scaling_table.py -->", "<!-- end -->"

NVLINK = replace(links_of(world_of(1, shard=False), CARDS["h200"])[1], name="NVLink 4")
PCIE = Link("PCIe 5.0 x16", REACHED * 64e9, 10e-6)
PASS = 8192
MACHINE = MACHINES[-1]
COUNTS = (2, 8, 16, 64)

RATES = {"full": 17_290, "chat": 14_406}
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


def of_one(name: str, ranks: int = 1, shard: bool = False) -> Held:
    """What one of so many processes holds; moments in float32."""
    world = world_of(ranks, shard)
    return Held(SHAPES[name], "nf4", 2, lora=LoraConfig(r=16), optimizer="adamw_torch", on_card=False, world=world)


def seconds(name: str, rows: str) -> float:
    """Of a step on one card: as measured for 8B, by its multiplications for 70B."""
    rate = RATES[rows]
    if name == "70B":
        rate = rate * of_one("8B").projected / of_one("70B").projected * RECOMPUTING
    return TOKENS[rows] / rate


def sent(name: str, rows: str, ranks: int, shard: bool) -> StepBytes:
    """By each process in a step."""
    return step_bytes(of_one(name, ranks, shard), -(-TOKENS[rows] // PASS))


CASES = (("8B", "full", False), ("8B", "chat", False), ("70B", "full", True), ("70B", "chat", True))


def held() -> list[str]:
    """What a process holds."""
    made = [
        "| model | trained numbers | frozen layers, 4 bits | GiB a process, whole | divided by 2 | by 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        each = []
        for one in (of_one(name, ranks, shard=True) for ranks in (1, 2, MACHINE)):
            each.append((total(model_items(one)) + total(adapter_items(one)) + one.gathered) / 2**30)
        whole = of_one(name)
        cells = [f"{sum(whole.matrices) / 1e6:.1f} million", f"{whole.parts / 2**30:.1f} GiB"]
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
        step = sent(name, rows, MACHINE, shard)
        cells = [f"{seconds(name, rows) * 1e3:,.0f}", f"{step.reduced / 1e6:,.0f}"]
        cells += [f"{step.reduced / link.bytes_s * 1e3:,.1f}" for link in (NVLINK, PCIE, NETWORK)]
        cells.append(f"{step.gathered / 1e6:,.0f}" if shard else "")
        cells += [f"{step.gathered / link.bytes_s * 1e3:,.0f}" if shard else "" for link in (NVLINK, PCIE)]
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
                link, alone = inside if ranks <= MACHINE else NETWORK, seconds(name, rows)
                longer = waiting(alone, sent(name, rows, ranks, shard), ranks, link, inside)
                shares.append(efficiency(alone, longer))
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
