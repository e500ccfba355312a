"""``plan.budget``: sizes as people say them."""

import pytest

from jebi.errors import ConfigError
from jebi.plan.budget import budget_bytes, checkpointing_of

GB = 2**30


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (None, 100 * GB), ("16GB", 16 * GB), ("16 GiB", 16 * GB), ("1.5g", GB * 3 // 2), ("900 MB", 900 * 2**20),
        (12 * GB, 12 * GB), (0.5, 50 * GB), ("0.5", 50 * GB), (1, 100 * GB), (str(12 * GB), 12 * GB),
    ],
)  # fmt: skip
def test_sizes(said: float | str | None, found: int) -> None:
    assert budget_bytes(said, 100 * GB) == found


@pytest.mark.parametrize("said", ["much", "16 apples", "0GB", 0, -1, "-3GB", "200GB", 101 * GB])
def test_what_is_no_size_is_told(said: float | str) -> None:
    with pytest.raises(ConfigError, match=r"memory_budget"):
        budget_bytes(said, 100 * GB)


def test_what_layers_keep_is_read_from_the_trainers_settings() -> None:
    assert checkpointing_of({}) is checkpointing_of({"gradient_checkpointing": False}) is None
    assert checkpointing_of({"gradient_checkpointing": True}) == "recompute"
    offload = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}
    assert checkpointing_of(offload) == "offload"
