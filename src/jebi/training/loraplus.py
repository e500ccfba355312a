"""Learning rates of their own for parts of an adapter: LoRA+ (arXiv:2402.12354) and wholly trained embeddings.

Which parameters LoRA+ quickens is PEFT's choice (``optimizers/loraplus.py``): the matrices B, and every vector. Groups
are split after the optimizer was made, so that weight decay and everything else about them stays.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from jebi.errors import ConfigError
from jebi.training.arguments import SFTConfig

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Rates:
    """What differs from the ordinary learning rate, where it does."""

    ratio: float | None = None
    """Rate of the matrices B and of vectors, as a multiple of the ordinary one."""
    embedding: float | None = None
    """Rate of a wholly trained embedding and head."""


def own_rates(config: SFTConfig, has_optimizer: bool) -> Rates:
    """The rates that the settings ask for.

    Raises:
        ConfigError: a rate is not above 0, or the caller brought an optimizer with groups of its own.
    """
    for name in ("loraplus_lr_ratio", "embedding_learning_rate"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, not {value}.")
        if value is not None and has_optimizer:
            raise ConfigError(f"{name} does nothing beside an optimizer of your own: set the rates of its groups.")
    return Rates(config.loraplus_lr_ratio, config.embedding_learning_rate)


def split_rates(optimizer: Optimizer, model: nn.Module, rates: Rates) -> None:
    """Move parameters with another learning rate into groups of their own.

    Args:
        optimizer: freshly made; its groups have the ordinary rate.
        model: whose parameters it has.
        rates: what differs from the ordinary rate.

    Raises:
        ConfigError: there is nothing such a rate would be for.
    """
    ratio, embedding = rates.ratio, rates.embedding
    if embedding is not None:
        tables = _named(model, lambda name, p: name.endswith(_EMBEDDINGS))
        if not _split(optimizer, tables, lambda _: embedding):
            raise ConfigError("embedding_learning_rate needs modules_to_save=['embed_tokens', 'lm_head'].")
    if ratio is not None:
        quick = _named(model, lambda name, p: name.endswith(".lora.B_Nr") or p.ndim == 1)
        if not _split(optimizer, quick, lambda rate: rate * ratio):
            raise ConfigError("loraplus_lr_ratio needs an adapter: call FastLanguageModel.get_peft_model first.")


def _named(model: nn.Module, wanted: Callable[[str, Tensor], bool]) -> set[int]:
    return {id(p) for name, p in model.named_parameters() if p.requires_grad and wanted(name, p)}


def _split(optimizer: Optimizer, wanted: set[int], rate: Callable[[float], float]) -> bool:
    """Move the wanted parameters of each group to a new one behind; whether there were any."""
    found = False
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in wanted]
        if not moved:
            continue
        found = True
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        optimizer.add_param_group(group | {"params": moved, "lr": rate(group["lr"])})
    return found
