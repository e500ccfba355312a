"""How products of few rows are cut and launched; what they compute is `parity_decoding`'s."""

import pytest
import torch

pytest.importorskip("triton")

from jebi.kernels.gpu import few_rows
from jebi.kernels.gpu.few_rows import DENSE, INT8, NF4, Stored
from jebi.kernels.gpu.few_rows_epilogue import Epilogue, epilogue_constants

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
BEST = {
    (NF4, 1): ((16, 4, 1), (16, 8, 1), (16, 4, 1), (16, 8, 1)),
    (NF4, 4): ((16, 4, 2), (16, 8, 2), (32, 4, 1), (16, 8, 2)),
    (NF4, 16): ((16, 4, 1), (16, 4, 2), (32, 2, 1), (16, 8, 1)),
    (INT8, 1): ((16, 8, 2), (16, 8, 2), (32, 2, 2), (16, 8, 2)),
    (INT8, 16): ((16, 4, 2), (16, 8, 2), (32, 4, 1), (16, 8, 2)),
    (DENSE, 1): ((16, 4, 2), (16, 8, 2), (16, 4, 2), (16, 8, 2)),
    (DENSE, 16): ((32, 4, 1), (16, 8, 2), (32, 4, 1), (16, 8, 2)),
}
"""By form and rows, for the shapes in their order: the fastest on an H200, or within a twentieth of it."""


def stored(kind: int, shape: tuple[int, int] = (4096, 4096)) -> Stored:
    return Stored(kind, torch.empty(0), torch.empty(0), None, shape)


@pytest.mark.parametrize(("kind", "rows"), BEST)
def test_products_are_cut_as_was_measured(kind: int, rows: int) -> None:
    tiles = [few_rows.tile_of(stored(kind, shape), rows) for shape in SHAPES.values()]
    assert tuple((tile.rows, tile.warps, tile.units) for tile in tiles) == BEST[kind, rows]


def test_only_products_that_read_ahead_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_rows, "overlaps", lambda x: True)
    early = {kind: few_rows.overlap(stored(kind)) for kind in (DENSE, INT8, NF4)}
    assert early == {kind: {"OVERLAP": kind == NF4, "launch_pdl": kind == NF4} for kind in early}


@pytest.mark.parametrize(("rank", "width", "eight"), [(8, 8, True), (48, 48, True), (12, 12, False), (8, 12, False)])
def test_ranks_are_read_wide_where_ranks_and_strides_come_by_eights(rank: int, width: int, eight: bool) -> None:
    left, right = (torch.empty(rows, width)[:, :rank] for rows in (3, 32))
    assert epilogue_constants(Epilogue(None, left, right))["EIGHT"] == eight
    assert not epilogue_constants(Epilogue())["EIGHT"]
