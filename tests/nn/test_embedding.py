"""``nn.embedding``: scaled as transformers scales, from wherever the table lies."""

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from jebi.nn.embedding import Embedding
from jebi.nn.host_weight import HostWeight


@torch.no_grad()
def test_the_scale_is_rounded_to_the_compute_dtype() -> None:
    table = torch.randn(30, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = Embedding(30, 48, 48**0.5, torch.bfloat16)
    ours.weight = torch.nn.Parameter(table)
    theirs = Gemma3TextScaledWordEmbedding(30, 48, None, embed_scale=48**0.5)
    theirs.weight = torch.nn.Parameter(table)
    assert torch.equal(ours(torch.arange(30)), theirs(torch.arange(30)))


def test_a_table_in_host_memory_gives_the_same_rows_and_stays_there() -> None:
    """On a card the rows come over the bus; here by the reference's way."""
    table = torch.randn(30, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = Embedding(30, 48, 3.0, torch.bfloat16)
    ours.store(torch.nn.Parameter(table, requires_grad=False))
    ids = torch.randint(30, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = ours(ids)
    ours.store(HostWeight(table, torch.device("cpu")))
    assert torch.equal(ours(ids), expected)
    assert (ours.num_embeddings, ours.embedding_dim) == (30, 48)
    assert not list(ours.parameters())
    assert not list(ours.buffers())
    ours.to("meta")
    assert isinstance(ours.weight, HostWeight)
    assert ours.weight.device.type == "meta"
    assert torch.equal(ours.weight.weight_NK, table)
    assert ours.float().weight.dtype == torch.bfloat16
