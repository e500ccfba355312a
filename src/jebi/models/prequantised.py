"""Checkpoints that come quantised: which kinds are read, and how the tensors of a weight become one.

bitsandbytes' 4-bit weights stay as they are; the 8-bit kinds are made dense, to be held as asked. What a kind's
numbers mean is `quant.nf4`'s and `quant.scaled`'s business.

Sources: transformers ``quantizers/quantizer_bnb_4bit.py``, ``quantizer_bnb_8bit.py``, ``quantizer_finegrained_fp8.py``
and ``quantizer_fbgemm_fp8.py`` for the names of the tensors; compressed-tensors' format "float-quantized".
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from jebi.errors import ModelError, WeightsError
from jebi.models.files import StoredTensor
from jebi.quant.nf4 import QUANT_STATE, NF4Weight, from_bitsandbytes, quant_facts
from jebi.quant.scaled import llm_int8, scaled

SUPPORTED = (
    "bitsandbytes 4-bit (nf4), bitsandbytes 8-bit, fp8, fbgemm_fp8, compressed-tensors in format 'float-quantized'"
)
"""The kinds that are read, for messages."""

_Parts = Mapping[str, Tensor]
"""A weight's tensors by their names in its module: ``weight``, ``weight.absmax``, ``SCB`` and so on."""

_NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)
_ACTIVATIONS = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "k_scale", "v_scale")
"""Scales of activations, which fp8 checkpoints have for engines that compute in fp8; jebi does not."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of a checkpoint are quantised."""

    parts: tuple[str, ...]
    """Names, in a module, of the tensors beside its ``weight``."""
    join: Callable[[_Parts], Tensor | NF4Weight]
    """Make one weight of them."""
    ignored: tuple[str, ...] = ()
    """Last parts of the names of tensors that no weight needs."""
    as_stored: bool = False
    """Whether `join` gives a form that jebi holds; a dense weight of such a checkpoint was left dense on purpose."""


def read_scheme(config: PretrainedConfig) -> Scheme | None:
    """How the checkpoint of ``config`` is quantised, or None where it is not.

    Raises:
        ModelError: it is quantised in a way that is not read.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    four, eight = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
    method = str(settings.get("quant_method") or ("bitsandbytes" if four or eight else "an unnamed method"))
    if method == "bitsandbytes" and four:
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if kind == "nf4":
            return Scheme(tuple(f"weight.{part}" for part in _NF4_PARTS), from_bitsandbytes, as_stored=True)
        method = f"bitsandbytes 4-bit ({kind})"
    elif method == "bitsandbytes" and eight:
        return Scheme(("SCB", "weight_format"), _join_llm_int8)
    elif method == "fp8":
        return _scaled("weight_scale_inv", settings.get("weight_block_size"))
    elif method == "fbgemm_fp8":
        return _scaled("weight_scale", None)
    elif method == "compressed-tensors":
        form = settings.get("format")
        if form == "float-quantized":
            return _scaled("weight_scale", _compressed_block(settings))
        method = f"compressed-tensors in format '{form}'"
    raise ModelError(
        f"the checkpoint is quantised with {method}, which jebi does not read. It reads {SUPPORTED}. "
        "Load the model's unquantised checkpoint; load_in_4bit=True quantises it on the way in."
    )


def joined(tensors: Iterable[StoredTensor], scheme: Scheme) -> Iterator[StoredTensor]:
    """The checkpoint's tensors with those of each quantised weight made one, which has the weight's own shape."""
    held = {stored.name: stored for stored in tensors}
    parts_of_weights = {
        f"{module}.{part}"
        for module in (name.removesuffix(".weight") for name in held if name.endswith(".weight"))
        for part in scheme.parts
    }
    for name, stored in held.items():
        if name in parts_of_weights or name.rpartition(".")[2] in scheme.ignored:
            continue
        module = name.removesuffix(".weight")
        parts = {part: held[f"{module}.{part}"] for part in scheme.parts if f"{module}.{part}" in held}
        yield _join(stored, parts, scheme) if parts and module != name else stored


def _join(stored: StoredTensor, parts: Mapping[str, StoredTensor], scheme: Scheme) -> StoredTensor:
    shape = stored.shape
    if scheme.as_stored:
        state = f"weight.{QUANT_STATE}"
        try:
            shape = tuple(quant_facts({name: _tensor(part) for name, part in parts.items() if name == state})["shape"])
        except WeightsError as error:
            raise WeightsError(f"'{stored.file}': tensor '{stored.name}': {error}") from error
    return StoredTensor(stored.name, shape, stored.file, partial(_read, stored, parts, scheme))


def _read(stored: StoredTensor, parts: Mapping[str, StoredTensor], scheme: Scheme) -> Tensor | NF4Weight:
    return scheme.join({"weight": _tensor(stored)} | {name: _tensor(part) for name, part in parts.items()})


def _tensor(stored: StoredTensor) -> Tensor:
    value = stored.read()
    assert isinstance(value, Tensor)
    return value


def _join_llm_int8(parts: _Parts) -> Tensor:
    # The formats beside 0 order the numbers as some GPUs' kernels wanted them; bitsandbytes has dropped them.
    if "weight_format" in parts and int(parts["weight_format"]) != 0:
        raise WeightsError("its numbers are not in rows (weight_format 0); save the model again with bitsandbytes 0.45")
    return llm_int8(parts["weight"], _needed(parts, "SCB"))


def _scaled(scale: str, block: Sequence[int] | None) -> Scheme:
    def join(parts: _Parts) -> Tensor:
        return scaled(parts["weight"], _needed(parts, scale), block)

    return Scheme((scale,), join, ignored=_ACTIVATIONS)


def _needed(parts: _Parts, name: str) -> Tensor:
    if name not in parts:
        raise WeightsError(f"its scale '{name}' is missing")
    return parts[name]


def _compressed_block(settings: dict[str, Any]) -> Sequence[int] | None:
    """The block that compressed-tensors' scales belong to; None for one scale a matrix or a row."""
    groups = settings.get("config_groups") or {}
    blocks = {tuple((group.get("weights") or {}).get("block_structure") or ()) for group in groups.values()}
    if len(blocks) > 1:
        raise ModelError(
            "the checkpoint mixes compressed-tensors' block sizes; load the model's unquantised checkpoint."
        )
    block = blocks.pop() if blocks else ()
    return block or None
