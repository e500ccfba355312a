"""Bytes of a matrix by how it is stored, for loaders and plans. The formats are `nf4`'s and `int8`'s. No torch here."""

from jebi.config import Storage
from jebi.config.limits import DYNAMIC_BLOCK

_NF4_BLOCK, _INT8_BLOCK = 64, 64


def weight_bytes(storage: Storage, values: int, element: int, shares: int = 1) -> int:
    """Bytes that a process holds of a projection of so many values.

    NF4 has a byte of scale in 64 values and a float32 in 256 of these.

    Args:
        storage: how it is stored.
        values: of the whole projection.
        element: bytes of a dense value.
        shares: processes that divide it; scales that are floating point numbers each of them has (`nn.sharding`).
    """
    divided, whole = _tensors(storage, values, element)
    return sum(-(-size // shares) for size in divided) + whole


def divided_bytes(storage: Storage, values: int, element: int) -> int:
    """What of it several processes divide, and gather to compute with."""
    return sum(_tensors(storage, values, element)[0])


def _tensors(storage: Storage, values: int, element: int) -> tuple[list[int], int]:
    """Bytes of each tensor that may be divided, and of what may not."""
    if storage == "nf4":
        scales = -(-values // _NF4_BLOCK)
        return [-(-values // 2), scales], 4 * -(-scales // DYNAMIC_BLOCK) + 4
    if storage == "int8":
        return [values], 4 * -(-values // _INT8_BLOCK)
    return [values * (4 if storage == "masters" else element)], 0
