"""NF4 weights: QLoRA's 4-bit storage of a frozen matrix, in plain torch.

Each value is one of 16 levels (the quantiles of a normal distribution) times the largest magnitude of its
block of 64; those magnitudes, less their mean, are themselves stored in 8 bits in blocks of 256 ("double
quantisation"). That is 4.127 bits a value (QLoRA, arXiv:2305.14314, sections 2 and 3). The bytes are those of
bitsandbytes 0.50's ``quantize_4bit(..., quant_type="nf4", compress_statistics=True)`` on CPU, and weights are
exchanged with it under its names in a state dict, those without double quantisation as well.

The 8-bit format is ``quant.dynamic8``'s business; layers that multiply by the dense weight live in ``nn``.

Shape suffixes: N rows, K columns, P packed bytes, B blocks, D blocks of block scales, V values of a stretch.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from jebi.errors import WeightsError
from jebi.quant import dynamic8
from jebi.quant.blocks import move_buffers, stretch, stretches, unit

# arXiv:2305.14314, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_ZERO = LEVELS.index(0.0)
_BINS = 256  # of [-1, 1]; finer than the levels' spacing, so that a bin holds one threshold at most
_TINY = 1e-38  # divides where a block is all zeros
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANT_STATE = "quant_state.bitsandbytes__nf4"
"""The tensor beside a bitsandbytes 4-bit weight that holds its facts."""


class NF4Weight(nn.Module):
    """A matrix of shape [N, K] held as NF4.

    Buffers: ``packed`` uint8 [P], two levels a byte, the first in the high half; ``absmax`` uint8 [B];
    ``nested_absmax`` float32 [D]; ``offset`` float32 []. Without double quantisation, as some checkpoints have it,
    ``absmax`` is float32 and the last two are None. They follow ``.to(device)`` but keep their dtypes under
    ``.to(dtype)``, ``.half()`` and the like, as rounded scales would be another weight. ``shape``, ``dtype``
    (what the matrix had before) and ``block`` are plain attributes, absent from ``state_dict()``.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        *,
        shape: tuple[int, int],
        dtype: torch.dtype,
        block: int = 64,
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.block = shape, dtype, block
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("offset", offset)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight_NK: Tensor, block: int = 64) -> "NF4Weight":
        """Quantise a float32, bfloat16 or float16 matrix, on its own device, in blocks along its rows.

        ``block`` is even. Raises ``WeightsError`` when the matrix holds a NaN or an infinity.
        """
        assert weight_NK.dim() == 2
        assert block % 2 == 0
        flat = weight_NK.reshape(-1)
        packed_P = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
        scales_B = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
        edge = flat.numel() // block * block
        step = max(1, stretch(flat.device) // block) * block
        for start in range(0, edge, step):
            stop = min(start + step, edge)
            _encode(flat[start:stop], block, packed_P[start // 2 :], scales_B[start // block :])
        if edge < flat.numel():
            _encode(flat[edge:], block, packed_P[edge // 2 :], scales_B[edge // block :])
        offset = scales_B.mean()
        absmax_B, nested_absmax_D = dynamic8.quantize(scales_B - offset)
        shape = (weight_NK.shape[0], weight_NK.shape[1])
        return cls(packed_P, absmax_B, nested_absmax_D, offset, shape=shape, dtype=weight_NK.dtype, block=block)

    @classmethod
    def blank(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, block: int = 64) -> "NF4Weight":
        """Room for what `quantize` makes of a matrix of that shape; its bytes are anything."""
        values = shape[0] * shape[1]
        blocks = -(-values // block)
        packed_P, absmax_B = (torch.empty(n, dtype=torch.uint8, device=device) for n in ((values + 1) // 2, blocks))
        nested_absmax_D = torch.empty(-(-blocks // dynamic8.BLOCK), dtype=torch.float32, device=device)
        offset = torch.empty((), dtype=torch.float32, device=device)
        return cls(packed_P, absmax_B, nested_absmax_D, offset, shape=shape, dtype=dtype, block=block)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the matrix [N, K] in ``dtype``: level times block scale in float32, then rounded once.

        Writes into ``out`` when given: of that shape, dtype and device, with any strides. Beyond the result
        it needs one cache-sized buffer and the block scales as float32 (1/64 of the values).
        """
        device = self.packed.device
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=device)
        assert (out.shape, out.dtype, out.device) == (self.shape, dtype, device)
        scales_B = self.scales()
        for part, first in stretches(out, self.block):
            start = first * self.block
            packed = self.packed[start // 2 : (start + part.numel() + 1) // 2]
            scales = scales_B[first : first - (-part.numel() // self.block)]
            part.copy_(_decode(packed, scales, self.block)[: part.numel()].view(part.shape))
        return out

    @property
    def unit(self) -> int:
        """Every so many rows a block of block scales begins."""
        blocks = 1 if self.nested_absmax is None else dynamic8.BLOCK
        return unit(self.shape[1], self.block * blocks)

    def rows(self, start: int, stop: int) -> "NF4Weight":
        """The rows from ``start``, a multiple of `unit`, to before ``stop``; they share the weight's memory."""
        assert start % self.unit == 0
        first, columns = start * self.shape[1], self.shape[1]
        values = (min(stop, self.shape[0]) - start) * columns
        packed = self.packed[first // 2 :][: -(-values // 2)]
        absmax = self.absmax[first // self.block :][: -(-values // self.block)]
        nested = self.nested_absmax
        if nested is not None:
            nested = nested[first // self.block // dynamic8.BLOCK :][: -(-absmax.numel() // dynamic8.BLOCK)]
        shape = (values // columns, columns)
        return NF4Weight(packed, absmax, nested, self.offset, shape=shape, dtype=self.dtype, block=self.block)

    def scales(self) -> Tensor:
        """Return the blocks' scales: float32 [B]; not to be written to."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        return dynamic8.dequantize(self.absmax, self.nested_absmax).add_(self.offset)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Show the matrix's shape and dtype where modules are printed."""
        return f"shape={self.shape}, dtype={self.dtype}, block={self.block}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Weight":
        move_buffers(self, fn)
        return self


def to_bitsandbytes(weight: NF4Weight, name: str = "weight") -> dict[str, Tensor]:
    """Return the weight as ``bitsandbytes.nn.Linear4bit.state_dict()`` has it, under ``name``.

    The packed bytes are [P, 1]; ``NAME.quant_state.bitsandbytes__nf4`` is a JSON text as uint8.
    """
    facts: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    device = weight.packed.device
    tensors = {
        name: weight.packed.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": torch.tensor(LEVELS, dtype=torch.float32, device=device),
    }
    if weight.nested_absmax is not None and weight.offset is not None:
        facts |= {
            "nested_blocksize": dynamic8.BLOCK,
            "nested_dtype": "float32",
            "nested_offset": weight.offset.item(),
        }
        tensors |= {
            f"{name}.nested_absmax": weight.nested_absmax,
            f"{name}.nested_quant_map": dynamic8.dynamic_code(signed=True).to(device),
        }
    tensors[f"{name}.{QUANT_STATE}"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors


def from_bitsandbytes(tensors: Mapping[str, Tensor], name: str = "weight") -> NF4Weight:
    """Build the weight called ``name`` from the tensors of a bitsandbytes state dict; it shares their memory.

    Raises ``WeightsError`` when one is missing, or when it is not NF4.
    """
    facts = quant_facts(tensors, name)
    # Stored as another dtype (bnb_4bit_quant_storage) the bytes are the same.
    packed = _take(tensors, name).reshape(-1).view(torch.uint8)
    absmax, levels = (_take(tensors, name + part) for part in (".absmax", ".quant_map"))
    nested_absmax = offset = None
    other_levels = not _same_table(levels, torch.tensor(LEVELS))
    if "nested_offset" in facts:
        nested_absmax, nested_code = (_take(tensors, name + part) for part in (".nested_absmax", ".nested_quant_map"))
        offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=packed.device)
        other_levels |= not _same_table(nested_code, dynamic8.dynamic_code(signed=True))
    if other_levels:
        raise WeightsError(f"{name} was quantised with other levels than NF4's; load the unquantised model")
    rows, columns = facts["shape"]
    values, block = rows * columns, facts["blocksize"]
    blocks = -(-values // block)
    sizes = [packed.numel(), absmax.numel(), -(-blocks // dynamic8.BLOCK)]
    if nested_absmax is not None:
        sizes[2] = nested_absmax.numel()
    if sizes != [(values + 1) // 2, blocks, -(-blocks // dynamic8.BLOCK)]:
        raise WeightsError(f"{name} is {rows} by {columns}, but its stored bytes are of another size")
    if absmax.dtype != (torch.float32 if nested_absmax is None else torch.uint8):
        raise WeightsError(f"{name}.absmax is of dtype {absmax.dtype}, which does not fit its quant_state")
    dtype = _DTYPES[facts["dtype"]]
    return NF4Weight(packed, absmax, nested_absmax, offset, shape=(rows, columns), dtype=dtype, block=block)


def quant_facts(tensors: Mapping[str, Tensor], name: str = "weight") -> dict[str, Any]:
    """What ``NAME.quant_state.bitsandbytes__nf4`` says: ``shape``, ``dtype``, ``blocksize`` and the like.

    Raises ``WeightsError`` when it is missing, broken, or says what jebi does not have.
    """
    text = bytes(_take(tensors, f"{name}.{QUANT_STATE}").tolist())
    try:
        facts: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{name}.{QUANT_STATE} is no JSON text; the file is damaged") from error
    if facts.get("nested_blocksize", dynamic8.BLOCK) != dynamic8.BLOCK:
        raise WeightsError(
            f"{name} is doubly quantised in blocks of {facts['nested_blocksize']}, not {dynamic8.BLOCK}; "
            "load the unquantised model"
        )
    if facts.get("dtype") not in _DTYPES or len(facts.get("shape", ())) != 2 or "blocksize" not in facts:
        raise WeightsError(f"{name}.{QUANT_STATE} lacks a matrix's shape, dtype or block size: {facts}")
    return facts


def _take(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise WeightsError(f"{key} is missing; a bitsandbytes NF4 weight has it")
    return tensors[key]


def _same_table(stored: Tensor, expected: Tensor) -> bool:
    return stored.shape == expected.shape and torch.allclose(stored.float().cpu(), expected, atol=1e-6)


def _encode(values_V: Tensor, block: int, packed_out: Tensor, scales_out: Tensor) -> None:
    """Quantise whole blocks, or one shorter block, into the heads of ``packed_out`` and ``scales_out``."""
    short = values_V.numel() < block
    values_BK = values_V.float().view(-1, values_V.numel() if short else block)
    scales_B = values_BK.abs().amax(dim=1)
    if not torch.isfinite(scales_B).all():
        raise WeightsError("a weight holds NaN or infinite values; it cannot be quantised")
    # bitsandbytes divides in a short block and multiplies by the inverse elsewhere, which rounds otherwise,
    # and only in a short block does it store the scale that an all-zero block is divided by.
    if short:
        scales_B = scales_B.clamp(min=_TINY)
        scaled = values_BK / scales_B[:, None]
    else:
        scaled = values_BK * scales_B.clamp(min=_TINY).reciprocal()[:, None]
    scales_out[: scales_B.numel()] = scales_B
    codes = _nearest_level(scaled.view(-1).clamp_(-1.0, 1.0)).to(torch.uint8)
    if codes.numel() % 2:
        codes = nn.functional.pad(codes, (0, 1), value=_ZERO)
    packed_out[: codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]


def _nearest_level(scaled_V: Tensor) -> Tensor:
    """Return the index of the level nearest to each value of [-1, 1], ties downwards: int32 [V].

    A bin's lowest possible index comes from a table; one comparison with the threshold above it decides.
    """
    lowest, thresholds = _bins(scaled_V.device)
    codes = torch.index_select(lowest, 0, _bin(scaled_V))
    return codes.add_(scaled_V > torch.index_select(thresholds, 0, codes))


def _bin(scaled: Tensor) -> Tensor:
    return ((scaled + 1.0) * (_BINS / 2)).to(torch.int32)


@lru_cache(maxsize=8)
def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many thresholds lie in lower bins, int32 [_BINS + 1], and the thresholds, float32 [16]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")
    thresholds = (levels[:-1] + levels[1:]) / 2
    bins = torch.arange(_BINS + 1, dtype=torch.int32, device="cpu")
    lowest = torch.bucketize(bins, _bin(thresholds), out_int32=True)
    above_all = torch.full((1,), math.inf, dtype=torch.float32, device="cpu")
    return lowest.to(device), torch.cat([thresholds, above_all]).to(device)


def _decode(packed: Tensor, scales: Tensor, block: int) -> Tensor:
    """Return the values of ``packed``, which starts with a block: float32, twice its length."""
    pairs = torch.index_select(_pairs(packed.device), 0, packed.to(torch.int32))
    values = pairs.view(torch.float32)
    whole = values.numel() // block
    edge = whole * block
    values[:edge].view(-1, block).mul_(scales[:whole, None])
    if edge < values.numel():
        values[edge:].mul_(scales[whole])
    return values


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """Return the two float32 levels of each packed byte as one int64: [256]; a look-up then gives two."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    return pairs.contiguous().view(torch.int64).view(-1).to(device)
