"""A step's rows dealt to the processes of a training, by tokens, so that all of them finish together.

Every process reads all rows of a step and keeps its share: which rows those are follows from the rows alone, so nothing
has to be said between processes, and the rows of a step are those that one process would take. How rows become passes
is `passes`'.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from jebi.data.passes import Batch, Pass, cut
from jebi.models.unpadding import IGNORED
from jebi.nn.rows import Rows


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, and which of them this one is."""

    rank: int = 0
    """This one's number."""
    count: int = 1
    """How many there are."""
    in_step: bool = False
    """Whether all of them run as many passes: they pass weights to each other within one."""


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """For each of ``ranks`` processes the numbers of its rows, ascending.

    The longest row left goes to the process with the fewest tokens, so that the most that any has exceeds the least
    that is possible by a third at most (Graham, 1969, "Bounds on multiprocessing timing anomalies"); equal ones in the
    order of their numbers. There may be fewer rows than processes.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        least = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        shares[least].append(row)
        tokens[least] += lengths[row]
    return [sorted(share) for share in shares]


def passes_of(batches: list[Batch], tokens: int, share: bool, ranks: Ranks) -> list[Pass]:
    """This process's passes of a step whose rows are in ``batches``; ``tokens`` and ``share`` as in `passes.cut`.

    Where all processes are to run as many, passes from which nothing is learnt are added.
    """
    if ranks.count == 1:
        return cut(batches, tokens, share)
    shares = deal([length for batch in batches for length in batch["lengths"]], ranks.count)
    if not ranks.in_step:
        return cut(_picked(batches, shares[ranks.rank]), tokens, share)
    of_all = [cut(_picked(batches, rows), tokens, share) for rows in shares]
    missing = max(map(len, of_all)) - len(of_all[ranks.rank])
    return of_all[ranks.rank] + [_nothing()] * missing


def digest(batches: list[Batch]) -> int:
    """A number below 2**62 that differs where the rows do."""
    made = hashlib.sha256()
    for batch in batches:
        made.update(batch["input_ids"].cpu().numpy().tobytes())
        made.update(repr(batch["lengths"]).encode())
    return int.from_bytes(made.digest()[:8], "big") >> 2


def _picked(batches: list[Batch], rows: list[int]) -> list[Batch]:
    """The batches with these of their rows, numbered through all of them, and no others."""
    wanted, picked, first = set(rows), [], 0
    for batch in batches:
        ends = list(accumulate(batch["lengths"]))
        kept = [number for number in range(len(ends)) if first + number in wanted]
        first += len(ends)
        spans = [torch.arange(ends[n] - batch["lengths"][n], ends[n]) for n in kept]
        if not spans:
            continue
        index = torch.cat(spans)
        tensors = {name: value[:, index] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        picked.append(tensors | {"lengths": [batch["lengths"][number] for number in kept]})
    return picked


def _nothing() -> Pass:
    """A pass of one row of two tokens, one of which is learnt with no weight: its loss and gradients are 0."""
    labels = torch.tensor([[0, IGNORED]])
    return Pass(torch.zeros_like(labels), labels, torch.zeros(1, 2), Rows((0, 2), torch.arange(2)))
