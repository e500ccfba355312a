"""How much is done at a time: the sizes that kernels and layers keep to, and that a plan counts with. No torch here."""

CHUNK_TOKENS = 8192
"""Tokens of a layer's chunk: enough for products at full rate and for one dequantisation of 4-bit weights to cost
little."""

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's logits in the loss. A constant, so that equal seeds give equal sums whatever else runs on the
machine."""

TOKEN_HEADS = 2**19
"""Tokens times query heads of one backward call of attention: 65,536 tokens go 8 heads at a time, 16,384 by 32 heads at
once."""

SLICE_BYTES = 32 * 2**20
"""Size of a dense slice of a head that is not dense on its card: 4,096 rows of Llama 3.1 8B's head in 16 bits, enough
for its products to run at full rate."""

DYNAMIC_BLOCK = 256
"""Values that share a scale in the 8-bit format of optimizer moments; in the flat buffers a trained matrix begins at a
multiple of it."""

WHOLE_LAYERS = 3
"""Layers that several processes share and that are there whole at a time, at most (`nn.sharding`): the one that is
computed, one on its way, and its message."""

TRAVELLING = 2
"""Numbers that travel behind the gradients of several processes: the loss, and whether to stop."""


def chunk_tokens(vocabulary: int, on_card: bool = False) -> int:
    """Tokens in one chunk of the loss: as many as `CHUNK_BYTES` of float32 logits hold, at least 16; 4 times on a card.

    There the logits stay in 16 bits, and few tokens starve the products: 4,096 tokens of a vocabulary of 128,256 take
    24.5 ms in chunks of 128 on an H100, 11.4 in chunks of 512 and 10.3 in chunks of 1,024. The layers' working set is
    larger, and not there at that time.
    """
    if not on_card:
        return max(16, CHUNK_BYTES // (4 * vocabulary))
    return max(512, 4 * CHUNK_BYTES // (2 * vocabulary) // 256 * 256)
