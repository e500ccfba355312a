"""jebi: fine-tune large language models on one GPU, or on none.

The public names load on first use, so importing jebi is quick, has no side effect, and needs no order.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["FastLanguageModel", "SFTConfig", "SFTTrainer", "is_bfloat16_supported", "train_on_responses_only"]

if TYPE_CHECKING:
    from jebi.fast import FastLanguageModel, is_bfloat16_supported
    from jebi.training.arguments import SFTConfig
    from jebi.training.responses import train_on_responses_only
    from jebi.training.trainer import SFTTrainer

_HOMES = {
    "FastLanguageModel": "jebi.fast",
    "is_bfloat16_supported": "jebi.fast",
    "SFTConfig": "jebi.training.arguments",
    "SFTTrainer": "jebi.training.trainer",
    "train_on_responses_only": "jebi.training.responses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jebi' has no attribute '{name}'")
    from importlib import import_module

    from jebi.imports import uncollected

    with uncollected():
        return getattr(import_module(_HOMES[name]), name)
