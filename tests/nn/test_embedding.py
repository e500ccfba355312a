"""``nn.embedding``: scaled as transformers scales."""

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from jebi.nn.embedding import Embedding


@torch.no_grad()
def test_the_scale_is_rounded_to_the_compute_dtype() -> None:
    table = torch.randn(30, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = Embedding(30, 48, 48**0.5, torch.bfloat16)
    ours.weight = torch.nn.Parameter(table)
    theirs = Gemma3TextScaledWordEmbedding(30, 48, None, embed_scale=48**0.5)
    theirs.weight = torch.nn.Parameter(table)
    assert torch.equal(ours(torch.arange(30)), theirs(torch.arange(30)))
