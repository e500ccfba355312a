"""Whole prompts through a model in one pass: keys and values into the static cache, logits of the token after each.

`flat_prompts` lays rows end to end, whatever their lengths; it is the reference. `PaddedPrompts` has a fixed shape and
reads nothing of the host, so that it can be captured: on a card the host needs longer to launch the layers of a short
prompt one by one than the card to compute them. Capturing and replaying are the engine's.

Padding stands behind each row. Attention is causal, so that no token of the row sees it; what it leaves in the cache
lies in slots beyond the row's length, which steps hide and the row's next tokens write over.

Shapes: B rows, S tokens of a padded row, T tokens of all rows, D width, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from jebi.inference.kv_cache import StaticCache
from jebi.models.hf import JebiForCausalLM
from jebi.nn.attention import varlen_serves
from jebi.nn.rows import Rows, rows_from_lengths

FEWEST, MOST = 128, 1024
"""Tokens of all rows, padding included, that padded passes have. Fewer take a card as long, which reads all weights for
them. Of more, the host's time matters less: it takes 66 to 97 ms to launch 8B's 32 layers, an H200 by reckoning 10 ms
for the weights and 27 more for each 1,024 tokens."""
_SIZES = tuple(2**n for n in range(5, 11))
"""Powers of two, as the cache's: where a prompt fits into its row's slots, so does its padding."""


def sizes(rows: int) -> list[int]:
    """Each S that so many rows may be padded to, the smallest first."""
    return [size for size in _SIZES if FEWEST <= rows * size <= MOST]


def pads(model: JebiForCausalLM) -> bool:
    """Whether a padded pass can be captured where a step can.

    Blocks of capped scores go through torch's checkpointing, which reads the state of the random numbers.
    """
    return all(layer.attention.softcap is None for layer in model.model.shape.layers)


def flat_prompts(model: JebiForCausalLM, cache: StaticCache, ids_BS: Tensor, lengths: list[int]) -> Tensor:
    """Logits (B, V) of the token after each prompt.

    Args:
        model: made ready to answer.
        cache: of as many rows, with room for the longest.
        ids_BS: token ids, rows padded on the left.
        lengths: tokens of each row without padding.
    """
    device = model.device
    rows = _with_bounds(rows_from_lengths(lengths, device), model)
    counts_B = torch.tensor(lengths, device=device)
    places = None
    if len(set(lengths)) > 1:
        row_T = torch.arange(len(lengths), device=device).repeat_interleave(counts_B, output_size=sum(lengths))
        places = row_T, rows.positions_U
    flat_T = torch.cat([row[-length:] for row, length in zip(ids_BS, lengths)])
    out_BD = model.model.forward_prompts(
        model.model.embed_tokens(flat_T),
        rows,
        lambda layer, k, v: cache.write(layer, places, k, v),
        counts_B.cumsum(0) - 1,
    )
    return model.logits_of(out_BD)


class PaddedPrompts:
    """The same for rows that are padded behind to one length; its buffers stay where they are."""

    def __init__(self, model: JebiForCausalLM, rows: int, size: int):
        """So many rows of ``size`` tokens (B and S), of token 0 at first."""
        self._ids_BS = torch.zeros(rows, size, dtype=torch.long, device=model.device)
        self._rows = _with_bounds(rows_from_lengths([size] * rows, model.device), model)
        self._begins_B = torch.arange(rows, device=model.device) * size

    def fill(self, ids_BS: Tensor, lengths: list[int]) -> None:
        """Take prompts as `flat_prompts` takes them, none longer than S."""
        self._ids_BS.zero_()
        for mine_S, row, length in zip(self._ids_BS, ids_BS, lengths, strict=True):
            mine_S[:length] = row[-length:]

    def forward(self, model: JebiForCausalLM, cache: StaticCache, lengths_B: Tensor) -> Tensor:
        """Logits (B, V) of the token after each row's first ``lengths_B``, from tensors on the device alone."""
        out_BD = model.model.forward_prompts(
            model.model.embed_tokens(self._ids_BS.flatten()),
            self._rows,
            lambda layer, k, v: cache.write(layer, None, k, v),
            self._begins_B + lengths_B - 1,
        )
        return model.logits_of(out_BD)


def _with_bounds(rows: Rows, model: JebiForCausalLM) -> Rows:
    """Rows for one kernel whether alone or together, and for every length: cuDNN would plan each anew."""
    return replace(rows, cu=rows.cu_seqlens()) if varlen_serves(model.device, model.dtype) else rows
