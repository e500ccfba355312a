"""A checkpoint's bytes onto a card: reader threads fill pinned buffers, and copies run from there.

Copied from where its file is mapped, a tensor passes through the driver's own buffers in one thread, at 7 GB/s on an
H200 whose bus does 50. Here several threads read ahead of the tensor whose turn it is, so that the disk, the copies and
what is done with the last tensor go on at once. Which tensors there are is `models.files`'; what becomes of them is
`models.loading`'s.

Shape suffix: P bytes.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from jebi.models.files import StoredTensor

READERS = 4
"""Threads that read: one copies about 6 GB/s out of the page cache."""

BUFFERS = 8
BUFFER_BYTES = 2**24
"""128 MiB of host memory in all, however large the tensors are; smaller copies would not fill the bus."""


def staged(tensors: Iterable[StoredTensor], device: torch.device) -> Iterator[StoredTensor]:
    """The same tensors, whose ``read`` gives them on ``device``.

    Each must be read before the next is asked for. Those whose place in their file is not known are read as they were.
    """
    listed = list(tensors)
    with ThreadPoolExecutor(READERS, "jebi-reader") as pool:
        pieces = (piece for stored in listed for piece in _pieces(stored))
        stage = _Stage(pieces, pool, device)
        for stored in listed:
            yield stored if stored.span is None else replace(stored, read=partial(stage.read, stored))


@dataclass(frozen=True)
class _Piece:
    """A run of a file's bytes that one buffer holds."""

    file: Path
    start: int
    size: int


def _pieces(stored: StoredTensor) -> Iterator[_Piece]:
    if stored.span is None:
        return
    for start in range(stored.span.start, stored.span.stop, BUFFER_BYTES):
        yield _Piece(stored.file, start, min(BUFFER_BYTES, stored.span.stop - start))


class _Buffer:
    """Host memory that is filled by a reader, copied from, and filled again once that copy is done."""

    def __init__(self, device: torch.device):
        on_card = device.type == "cuda"
        self._bytes_P = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=on_card)
        self._copied = torch.cuda.Event() if on_card else None

    def fill(self, piece: _Piece) -> None:
        """Read ``piece``; runs in a reader's thread."""
        if self._copied is not None:
            self._copied.synchronize()
        view = self._bytes_P.numpy().data[: piece.size]
        with piece.file.open("rb", buffering=0) as file:
            file.seek(piece.start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError("the file has become shorter while it was read")
                view = view[count:]

    def copy_to(self, out_P: Tensor) -> None:
        """Start the copy of what was read into ``out_P``, on its device's current stream."""
        out_P.copy_(self._bytes_P[: out_P.numel()], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(out_P.device))


class _Stage:
    """The buffers, each on its way from a reader to the device and back."""

    def __init__(self, pieces: Iterator[_Piece], pool: ThreadPoolExecutor, device: torch.device):
        self._pieces, self._pool, self._device = pieces, pool, device
        self._filling: deque[tuple[_Piece, _Buffer, Future[None]]] = deque()
        for piece in islice(pieces, BUFFERS):
            self._send(_Buffer(device), piece)

    def _send(self, buffer: _Buffer, piece: _Piece) -> None:
        self._filling.append((piece, buffer, self._pool.submit(buffer.fill, piece)))

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor whose turn it is, on the device."""
        assert stored.span is not None
        value = torch.empty(stored.shape, dtype=stored.span.dtype, device=self._device)
        out_P = value.view(-1).view(torch.uint8)
        for expected in _pieces(stored):
            piece, buffer, filled = self._filling.popleft()
            assert piece == expected, "tensors are read in order, each of them"
            filled.result()
            start = piece.start - stored.span.start
            buffer.copy_to(out_P[start : start + piece.size])
            if (following := next(self._pieces, None)) is not None:
                self._send(buffer, following)
        return value
