"""A trained float32 copy of a module's frozen tensor, with the original kept beside it.

So a model computes with what was learnt and still is the base model when asked. The original lies in the buffer
``base_weight`` or ``base_bias``, which is no part of the state.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_LEAVES = ("weight", "bias")


def train_copy(module: nn.Module, leaf: str) -> None:
    """Put a trained float32 copy in place of ``module``'s weight or bias, unless there is one."""
    if getattr(module, f"base_{leaf}", None) is not None:
        return
    original: nn.Parameter = getattr(module, leaf)
    module.register_buffer(f"base_{leaf}", original, persistent=False)
    setattr(module, leaf, nn.Parameter(original.detach().clone().float()))


def copies(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every such copy: its module's path, the module, and which tensor it is."""
    for path, module in model.named_modules():
        for leaf in _LEAVES:
            if getattr(module, f"base_{leaf}", None) is not None:
                yield path, module, leaf


def drop_copies(model: nn.Module) -> None:
    """Put the originals back for good."""
    for _, module, leaf in list(copies(model)):
        setattr(module, leaf, _original(module, leaf))
        setattr(module, f"base_{leaf}", None)


@contextmanager
def originals_in_place(model: nn.Module) -> Iterator[None]:
    """Within it the model computes with the originals."""
    held = [(module, leaf, getattr(module, leaf)) for _, module, leaf in copies(model)]
    for module, leaf, _ in held:
        setattr(module, leaf, _original(module, leaf))
    try:
        yield
    finally:
        for module, leaf, trained in held:
            setattr(module, leaf, trained)


def _original(module: nn.Module, leaf: str) -> nn.Parameter:
    """The very parameter, so that tied weights are tied again; a move to another device leaves a mere tensor."""
    original: Tensor = getattr(module, f"base_{leaf}")
    return original if isinstance(original, nn.Parameter) else nn.Parameter(original, requires_grad=False)
