"""Known cards: their memory and the rates that a training reaches on them. What was measured of the present
machine is `measured`'s.

Peaks are the vendors' for dense products with float32 sums. What is reached of them was measured on H100 and H200 with
the products of Llama 8B's shape (750 TFLOP/s of 989 in 16 bits, 1,350 of 1,979 in 8, 3.0 of 3.35 TB/s; torch 2.11); of
other cards it is a guess by kind, which their predictions' wider range says. Links are NVLink's, in one direction, of
the form that servers have.
"""

from dataclasses import dataclass

from jebi.errors import ConfigError
from jebi.plan.inventory import GIB


@dataclass(frozen=True)
class Card:
    """What a plan needs to know of a card."""

    name: str
    """As it is asked for."""
    memory: int
    """Bytes that a process may have of it, CUDA's context included."""
    products: float
    """FLOP/s reached in 16 bits."""
    fp8: float | None
    """FLOP/s reached in 8-bit floats, scaled by rows; None where there are none (below compute capability 9.0)."""
    bandwidth: float
    """Bytes a second reached in its memory."""
    bus: float
    """Bytes a second to and from host memory."""
    bfloat16: bool = True
    """Whether it computes in bfloat16; else in float16."""
    attention: float | None = None
    """FLOP/s of attention, forward and backward, in rows of 2,048 tokens, where it was measured."""
    link: float | None = None
    """Bytes a second reached in each direction to the other cards of a machine; None where the bus is between them."""
    spread: float = 0.3
    """Predicted times are within this share of what is measured, as far as is known."""


REACHED = 0.75
"""Share of what makers say of a link that large messages reach (a guess, until two cards are measured)."""


def _card(
    name: str,
    gigabytes: float,
    peak: float,
    reached: float,
    bandwidth: float,
    bus: float,
    fp8: float | None = None,
    link: float | None = None,
) -> Card:
    """In GiB, TFLOP/s, the share of them that is reached, GB/s and GB/s; ``fp8`` in TFLOP/s, ``link`` in GB/s."""
    return Card(
        name, int(gigabytes * GIB), peak * reached * 1e12, fp8 and fp8 * 1e12, 0.9e9 * bandwidth, bus * 1e9,
        bfloat16=name not in ("t4", "v100-16", "rtx2080ti"), link=link and REACHED * link * 1e9,
        spread=0.12 if name in ("h100", "h200") else 0.3,
    )  # fmt: skip


_ALL = (
    # A T4 holds its clock for a moment only (70 W); 25 TFLOP/s is what long products reach. NVIDIA T4 data sheet.
    _card("t4", 14.7, 65, 0.38, 320, 12),
    _card("v100-16", 15.7, 125, 0.65, 900, 12, link=150),  # V100 data sheet
    _card("rtx2080ti", 10.7, 53.8, 0.75, 616, 12),  # Turing white paper: half its float16 peak with float32 sums
    _card("rtx3060-12gb", 11.6, 25.6, 0.8, 360, 24),  # Ampere GA102 white paper, scaled to GA106's cores
    _card("rtx3090", 23.6, 71, 0.8, 936, 24),  # Ampere GA102 white paper
    _card("rtx4060ti-16gb", 15.6, 44, 0.8, 288, 12),  # Ada white paper, scaled to AD106's cores
    _card("rtx4090", 23.5, 165, 0.85, 1008, 24),  # Ada white paper
    _card("rtx5090", 31.3, 209.5, 0.85, 1792, 48, 209.5 * 2 * 0.7),  # Blackwell RTX white paper
    _card("l4", 22.0, 121, 0.5, 300, 24),  # L4 data sheet; 72 W
    _card("a10", 22.0, 125, 0.55, 600, 24),  # A10 data sheet; 150 W
    _card("a6000", 47.4, 155, 0.75, 768, 24),  # RTX A6000 data sheet
    _card("l40s", 44.4, 362, 0.6, 864, 24),  # L40S data sheet; 350 W
    _card("a100-40", 39.4, 312, 0.8, 1555, 24, link=300),  # A100 data sheet
    _card("a100-80", 79.2, 312, 0.8, 2039, 24, link=300),  # A100 data sheet
    _card("h100", 79.1, 989, 0.758, 3350, 50, 1350, 450),  # H100 data sheet (SXM)
    _card("h200", 139.8, 989, 0.758, 4800, 50, 1350, 450),  # H200 data sheet
    _card("b200", 178.0, 2250, 0.7, 8000, 50, 4500 * 0.6, 900),  # Blackwell data sheet
)
CARDS = {card.name: card for card in _ALL}
"""By their names, in the order of the kinds."""


def processor(threads: int, memory: int) -> Card:
    """A machine without a card, of which less is known.

    SmolLM2-135M makes 340 tokens/s on two cores of an AMD EPYC (docs/benchmarks/train_cpu.md): 0.1 TFLOP/s each.
    """
    return Card("cpu", memory, 0.1e12 * threads, None, 8e9 * threads, 8e9, bfloat16=True, spread=0.6)


def find_card(name: str) -> Card:
    """The card of a name, spelled as a data sheet or a driver may.

    Raises:
        ConfigError: it is none of `CARDS`.
    """
    plain = _plain(name)
    for card in CARDS.values():
        if plain == _plain(card.name):
            return card
    known = ", ".join(CARDS)
    raise ConfigError(f"--gpu '{name}' is not known: use one of {known}; or say --memory 16GB.")


def present_card(name: str, memory: int) -> Card | None:
    """The card that a driver calls ``name``, with the memory it says; None where it is none of `CARDS`.

    Of cards that are sold in two sizes the driver's memory decides.
    """
    plain, found = _plain(name), []
    for card in CARDS.values():
        kind = _plain(card.name.rpartition("-")[0] or card.name) if card.name.count("-") else _plain(card.name)
        if kind in plain:
            found.append((-len(kind), abs(card.memory - memory), card))
    return min(found, key=lambda each: each[:2])[2] if found else None


def _plain(name: str) -> str:
    kept = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "tesla", "graphics"):
        kept = kept.replace(word, "")
    return kept
