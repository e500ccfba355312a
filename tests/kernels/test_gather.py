"""``kernels.gather``: the reference is the embedding's look-up. Its kernel's test is tests/kernels/gpu/parity.py."""

import torch
import torch.nn.functional as F

from jebi.kernels.gather import gather, gather_reference, readable


def test_rows_by_their_numbers() -> None:
    table = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    for shape in ((4,), (2, 3), (1, 0)):
        ids = torch.randint(30, shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(gather(table, ids), F.embedding(ids, table))
        assert torch.equal(gather_reference(table, ids), F.embedding(ids, table))


def test_a_card_reads_page_locked_memory_alone() -> None:
    assert not readable(torch.zeros(3, 3))
