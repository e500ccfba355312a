"""Bytes of a matrix by how it is stored, for loaders and plans. The formats are `nf4`'s and `int8`'s. No torch here."""

from jebi.config import Storage
from jebi.config.limits import DYNAMIC_BLOCK

_NF4_BLOCK, _INT8_BLOCK = 64, 64


def weight_bytes(storage: Storage, values: int, element: int) -> int:
    """Bytes of a projection of so many values; ``element`` are those of a dense one.

    NF4 has a byte of scale in 64 values and a float32 in 256 of these.
    """
    if storage == "nf4":
        scales = -(-values // _NF4_BLOCK)
        return -(-values // 2) + scales + 4 * -(-scales // DYNAMIC_BLOCK) + 4
    if storage == "int8":
        return values + 4 * -(-values // _INT8_BLOCK)
    return values * (4 if storage == "masters" else element)
