"""8-bit weights in blocks: a frozen matrix as whole numbers from -127 to 127 times their block's scale.

Symmetric rounding to the nearest of 255 steps, the largest magnitude of each block of 64 values being step 127: the
block-wise form of absmax quantisation (arXiv:2208.07339, section 2.1, with blocks of arXiv:2110.02861). A value costs
8 bits and its share of a float32 scale, 8.5 bits (1.0625 bytes), and is off by a 254th of its block's largest at most.
The scale is float32 as half precision would save 3 % and lose small weights.

bitsandbytes' own 8-bit checkpoints have one scale a row; `quant.scaled` reads those.

Shape suffixes: N rows, K columns, B blocks, V values of a stretch.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jebi.errors import WeightsError
from jebi.quant.blocks import move_buffers, stretch, stretches, unit

_STEPS = 127


class Int8Weight(nn.Module):
    """A matrix of shape [N, K] held as 8-bit whole numbers in blocks along its rows.

    Buffers: ``codes`` int8 [N * K]; ``scales`` float32 [B]. They follow ``.to(device)`` but keep their dtypes under
    ``.to(dtype)``. ``shape``, ``dtype`` (what the matrix had before) and ``block`` are plain attributes.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self, codes: Tensor, scales: Tensor, *, shape: tuple[int, int], dtype: torch.dtype, block: int = 64
    ) -> None:
        super().__init__()
        self.shape, self.dtype, self.block = shape, dtype, block
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight_NK: Tensor, block: int = 64) -> "Int8Weight":
        """Quantise a float32, bfloat16 or float16 matrix, on its own device.

        Raises ``WeightsError`` when the matrix holds a NaN or an infinity.
        """
        assert weight_NK.dim() == 2
        flat = weight_NK.reshape(-1)
        codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        scales_B = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
        edge = flat.numel() // block * block
        step = max(1, stretch(flat.device) // block) * block
        for start in range(0, edge, step):
            stop = min(start + step, edge)
            _encode(flat[start:stop], block, codes[start:stop], scales_B[start // block : stop // block])
        if edge < flat.numel():
            _encode(flat[edge:], flat.numel() - edge, codes[edge:], scales_B[-1:])
        shape = (weight_NK.shape[0], weight_NK.shape[1])
        return cls(codes, scales_B, shape=shape, dtype=weight_NK.dtype, block=block)

    @classmethod
    def blank(cls, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, block: int = 64) -> "Int8Weight":
        """Room for what `quantize` makes of a matrix of that shape; its numbers are anything."""
        values = shape[0] * shape[1]
        codes = torch.empty(values, dtype=torch.int8, device=device)
        scales_B = torch.empty(-(-values // block), dtype=torch.float32, device=device)
        return cls(codes, scales_B, shape=shape, dtype=dtype, block=block)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the matrix [N, K] in ``dtype``: code times scale in float32, then rounded once.

        Writes into ``out`` when given: of that shape, dtype and device, with any strides.
        """
        device = self.codes.device
        if out is None:
            out = torch.empty(self.shape, dtype=dtype, device=device)
        assert (out.shape, out.dtype, out.device) == (self.shape, dtype, device)
        for part, first in stretches(out, self.block):
            codes_V = self.codes[first * self.block :][: part.numel()]
            scales = self.scales[first : first - (-part.numel() // self.block)]
            part.copy_(_decode(codes_V, scales, self.block).view(part.shape))
        return out

    @property
    def unit(self) -> int:
        """Every so many rows a block begins."""
        return unit(self.shape[1], self.block)

    def rows(self, start: int, stop: int) -> "Int8Weight":
        """The rows from ``start``, a multiple of `unit`, to before ``stop``; they share the weight's memory."""
        assert start % self.unit == 0
        first, columns = start * self.shape[1], self.shape[1]
        values = (min(stop, self.shape[0]) - start) * columns
        codes, scales = self.codes[first:][:values], self.scales[first // self.block :][: -(-values // self.block)]
        return Int8Weight(codes, scales, shape=(values // columns, columns), dtype=self.dtype, block=self.block)

    @property
    def nbytes(self) -> int:
        """Bytes that the buffers hold."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """Show the matrix's shape and dtype where modules are printed."""
        return f"shape={self.shape}, dtype={self.dtype}, block={self.block}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Weight":
        move_buffers(self, fn)
        return self


def _encode(values_V: Tensor, block: int, codes_out: Tensor, scales_out: Tensor) -> None:
    """Quantise whole blocks into ``codes_out`` [V] and ``scales_out`` [V / block]."""
    values_BK = values_V.float().view(-1, block)
    torch.div(values_BK.abs().amax(dim=1), _STEPS, out=scales_out)
    if not torch.isfinite(scales_out).all():
        raise WeightsError("a weight holds NaN or infinite values; it cannot be quantised")
    # A block of zeros has scale 0; so may one of subnormal numbers, whose quotient the clamp then bounds.
    scaled_BK = values_BK.div(scales_out[:, None]).nan_to_num_(nan=0.0).round_().clamp_(-_STEPS, _STEPS)
    codes_out.view(-1, block).copy_(scaled_BK)


def _decode(codes_V: Tensor, scales: Tensor, block: int) -> Tensor:
    """Return the values of ``codes_V``, which starts with a block: float32."""
    values_V = codes_V.float()
    edge = values_V.numel() // block * block
    values_V[:edge].view(-1, block).mul_(scales[: edge // block, None])
    if edge < values_V.numel():
        values_V[edge:].mul_(scales[-1])
    return values_V
