"""Several sources as one data set: how often each comes, in an order that a seed fixes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from jebi.errors import ConfigError

SEED = 3407
"""Of drawing and shuffling where the run names none; the tutorial's."""


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    name: str
    """A file, a folder, or a hub id."""
    weight: float = 1.0
    """How often each of its rows comes in an epoch; of a stream, how often it is drawn beside the others."""
    split: str | None = None
    """Split of a hub data set; None takes the run's."""


def read_sources(given: Any, setting: str) -> list[Source]:
    """A name, or a list of names and of ``{source: ..., weight: ...}``.

    Raises:
        ConfigError: it is something else; ``setting`` names it.
    """
    sources = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, str) and one:
            sources.append(Source(one))
        elif (
            isinstance(one, dict) and isinstance(one.get("source"), str) and one.keys() <= {"source", "weight", "split"}
        ):
            weight = one.get("weight", 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ConfigError(
                    f"{setting}: the weight of '{one['source']}' must be a number above 0, not {weight!r}."
                )
            if not isinstance(split := one.get("split"), str | None):
                raise ConfigError(f"{setting}: the split of '{one['source']}' must be a name, not {split!r}.")
            sources.append(Source(one["source"], float(weight), split))
        else:
            raise ConfigError(
                f"{setting} must be a file, a folder or a hub id, or a list of them and of "
                f"{{source: a.jsonl, weight: 2}}; not {one!r:.60}."
            )
    if not sources:
        raise ConfigError(f"{setting} is an empty list: name a file, a folder or a hub id.")
    return sources


def mix(parts: list[Dataset], weights: list[float], seed: int = SEED) -> Dataset:
    """Tokenised rows of several sources, each row as often as its source's weight says, shuffled.

    Of weight 2.5 every row comes twice and half of them, drawn by the seed, once more. One source of weight 1 stays as
    it is, in its order.
    """
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]
    chance = np.random.default_rng(seed)
    drawn = []
    for part, weight in zip(_alike(parts), weights):
        whole, rest = divmod(weight, 1)
        count = max(round(rest * len(part)), 0 if whole else 1)  # of no source nothing is left
        more = np.sort(chance.permutation(len(part))[:count])
        drawn.append(part.select(np.concatenate([np.arange(len(part))] * int(whole) + [more])))
    return concatenate_datasets(drawn).shuffle(seed=seed)


def mix_streams(parts: list[IterableDataset], weights: list[float], seed: int, buffer: int) -> IterableDataset:
    """Streams of tokenised rows as one, drawn by weight until all have ended, shuffled within a buffer of rows."""
    shares = [weight / sum(weights) for weight in weights]
    if len(parts) > 1:
        stream = interleave_datasets(
            parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted_without_replacement"
        )
    else:
        stream = parts[0]
    return stream.shuffle(seed=seed, buffer_size=buffer) if buffer > 1 else stream


def _alike(parts: list[Dataset]) -> list[Dataset]:
    """All with ``weights`` where any has them."""
    if not any("weights" in part.column_names for part in parts):
        return parts
    features = next(part.features for part in parts if "weights" in part.column_names)

    def count_once(row: dict[str, Any]) -> dict[str, Any]:
        return {"weights": [1.0] * len(row["input_ids"])}

    return [
        part if "weights" in part.column_names else part.map(count_once, features=features, keep_in_memory=True)
        for part in parts
    ]
