"""What a run is told: its settings, and their one reader."""

from jebi.config.checking import check_type, reject_unknown
from jebi.config.reading import read_run, run_from_dict
from jebi.config.settings import (
    ALL_LINEAR,
    TARGET_MODULES,
    Checkpointing,
    Compute,
    DataConfig,
    EmbeddingPlace,
    HeadPlace,
    LoraConfig,
    ModelConfig,
    Places,
    RunConfig,
    Storage,
)

__all__ = [
    "ALL_LINEAR",
    "TARGET_MODULES",
    "Checkpointing",
    "Compute",
    "DataConfig",
    "EmbeddingPlace",
    "HeadPlace",
    "LoraConfig",
    "ModelConfig",
    "Places",
    "RunConfig",
    "Storage",
    "check_type",
    "read_run",
    "reject_unknown",
    "run_from_dict",
]
