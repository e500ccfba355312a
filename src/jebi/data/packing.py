"""Several short rows in one sequence, each still a row of its own.

Rows are put, longest first, where they leave the least room (best fit). Their boundaries travel along as ``lengths``,
so attention never crosses them and positions restart.

    four rows of 100, 150, 200 and 300 tokens, sequences of 512:  [300 | 200]  [150 | 100]
"""

from bisect import bisect_left, insort
from itertools import chain
from typing import Any

from datasets import Dataset

from jebi.data.rows import Rows

WINDOW = 1000
"""Rows looked at together: enough to fill sequences to the last few tokens, few enough to keep memory small."""


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most ``capacity``, by best fit decreasing; deterministic.

    A row longer than ``capacity`` is a group of its own.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[index], -1))
        if place == len(rooms):
            groups.append([index])
            insort(rooms, (capacity - lengths[index], len(groups) - 1))
        else:
            room, group = rooms.pop(place)
            groups[group].append(index)
            insort(rooms, (room - lengths[index], group))
    return groups


def pack(rows: Rows, capacity: int) -> Rows:
    """Sequences of up to ``capacity`` tokens, each holding several rows of `data.rows`; a stream stays one."""

    def merge(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        groups = best_fit([len(ids) for ids in batch["input_ids"]], capacity)
        return {
            name: [list(chain.from_iterable(batch[name][i] for i in sorted(group))) for group in groups]
            for name in batch
        }

    settings = {"desc": "Packing"} if isinstance(rows, Dataset) else {}
    return rows.map(merge, batched=True, batch_size=WINDOW, **settings)
