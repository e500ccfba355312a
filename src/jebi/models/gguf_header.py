"""The header of a .gguf file: its fields, and where each tensor lies.

Format: ggml ``docs/gguf.md``, versions 2 and 3, little-endian. The gguf package reads it too, but makes a numpy view
of every token and merge of the vocabulary, which takes seconds. What fields and names mean is `gguf_config`'s and
`gguf_file`'s business.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jebi.errors import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` letters of the field types that are one number."""
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor, not read yet."""

    name: str
    """Its name in llama.cpp's layout."""
    kind: GGMLQuantizationType
    """How its blocks are stored."""
    shape: tuple[int, ...]
    """Its shape as torch has it, the fastest dimension last."""
    start: int
    """Where it begins in the file, in bytes."""
    nbytes: int
    """Bytes it takes there."""


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the weights."""

    fields: dict[str, Any]
    """Numbers, texts and lists of them by name; integers and floats are Python's."""
    tensors: tuple[GgufTensor, ...]
    """The tensors, in the file's order."""


def read_header(path: Path) -> GgufHeader:
    """Parse the header of ``path``.

    Raises:
        WeightsError: the file is none, of another version, or shorter than its header says.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            size = len(data)
            header = _Parser(data).header()
    except (struct.error, ValueError, OSError) as error:
        raise WeightsError(f"'{path}' is truncated or is no GGUF file: {error}") from error
    for tensor in header.tensors:
        if tensor.start + tensor.nbytes > size:
            raise WeightsError(f"'{path}' is truncated: tensor '{tensor.name}' ends beyond the file.")
    return header


class _Parser:
    """Reads one value after the other from the file's bytes."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if bytes(self._data[:4]) != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; jebi reads {_VERSIONS} in little-endian byte order")
        tensors, fields = self._number("Q"), self._number("Q")
        values = {self._text(): self._value(self._number("I")) for _ in range(fields)}
        infos = [self._tensor() for _ in range(tensors)]
        alignment = int(values.get("general.alignment", _ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        base = -(-self._at // alignment) * alignment
        return GgufHeader(values, tuple(_placed(*info, base) for info in infos))

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self._at)
        self._at += struct.calcsize(f"<{letter}")
        return value

    def _text(self) -> str:
        return self._texts(1)[0]

    def _texts(self, count: int) -> list[str]:
        """``count`` texts, each behind its length in bytes."""
        data, at, length_at = self._data, self._at, struct.Struct("<Q").unpack_from
        texts: list[str] = []
        add: Callable[[str], None] = texts.append
        for _ in range(count):
            begin = at + 8
            at = begin + length_at(data, at)[0]
            add(str(data[begin:at], "utf-8", "replace"))
        if at > len(data):
            raise ValueError("a text ends beyond the file")
        self._at = at
        return texts

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a field is of the unknown type {kind}")
        kind, count = self._number("I"), self._number("Q")
        if kind == _TEXT:
            return self._texts(count)
        if kind in _NUMBERS:
            numbers = np.frombuffer(self._data, np.dtype(_NUMBERS[kind]).newbyteorder("<"), count, self._at)
            self._at += numbers.nbytes
            return numbers.tolist()
        return [self._value(kind) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self._text(), self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {dimensions} dimensions")
        sizes = tuple(self._number("Q") for _ in range(dimensions))
        return name, sizes[::-1], GGMLQuantizationType(self._number("I")), self._number("Q")


def _placed(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int, base: int) -> GgufTensor:
    values, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % values:
        raise ValueError(
            f"tensor '{name}' has rows of {shape[-1]}, which are no whole blocks of {values} ({kind.name})"
        )
    count = 1
    for dimension in shape:
        count *= dimension
    return GgufTensor(name, kind, shape, base + offset, count // values * size)
