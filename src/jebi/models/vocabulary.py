"""A vocabulary of another size than the checkpoint's, for tokens that a tokenizer was given since; ids beyond it.

Shapes: V tokens, D width; B prompts, S tokens of a padded one.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from jebi.errors import DataError, ModelError
from jebi.nn.host_weight import HostWeight, matrix
from jebi.nn.linear import Linear

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel


def resize(model: "JebiPreTrainedModel", size: int) -> None:
    """Give the embedding, and the head where there is one, ``size`` rows; tied ones stay tied.

    New rows are the mean of the old ones, so that new tokens begin as no token in particular
    (nlp.stanford.edu/~johnhew/vocab-expansion.html, without its noise); rows beyond ``size`` are dropped.

    Raises:
        ModelError: the size is below 1; the model has an adapter, whose files name the sizes it was made for; or its
            head is quantised.
    """
    if size < 1:
        raise ModelError(f"a vocabulary has at least 1 token, not {size}.")
    if size == model.model.shape.vocabulary:
        return
    if model.adapter is not None:
        raise ModelError("resize_token_embeddings comes before get_peft_model: resize the model without its adapter.")
    embedding, head = model.model.embed_tokens, model.get_output_embeddings()
    old = embedding.weight
    if isinstance(head, Linear):
        weight = head.weight
        if not isinstance(weight, nn.Parameter | HostWeight):
            raise ModelError("a quantised head is not resized: load the model with head='card'.")
        if weight is not old:
            head.store(_resized(weight, size))
    embedding.store(_resized(old, size))
    if isinstance(head, Linear):
        if head.weight is old:
            head.store(embedding.weight)
        head.out_features = size
    model.model.shape = dataclasses.replace(model.model.shape, vocabulary=size)
    model.config.vocab_size = size


def require_known(ids: Tensor, vocabulary: int, whose: Callable[[int], str]) -> None:
    """Refuse ids that the model has no token for: an "index out of range" on a CPU, and the end of a process on a card.

    Args:
        ids: whole numbers of any shape, on any device.
        vocabulary: V.
        whose: says where a place among the flattened ids belongs: "row 3".

    Raises:
        DataError: one is below 0 or not below ``vocabulary``.
    """
    if not ids.numel():
        return
    lowest, highest = torch.stack(ids.aminmax()).tolist()
    if lowest >= 0 and highest < vocabulary:
        return
    flat = ids.flatten()
    place = int(((flat < 0) | (flat >= vocabulary)).nonzero()[0])
    raise DataError(
        f"{whose(place)} has the token {int(flat[place])}, but the model's are 0 to {vocabulary - 1}. Take the "
        "tokenizer that belongs to the model; if you gave it new tokens, call "
        "model.resize_token_embeddings(len(tokenizer)) before get_peft_model."
    )


def require_prompts(ids_BS: Tensor, keywords: dict[str, Any], vocabulary: int) -> None:
    """Refuse prompts that ``generate`` would stumble over later: none, unknown tokens, a mask of another width."""
    if ids_BS.shape[-1] == 0:
        raise DataError("the prompt holds no tokens: give it one at least, such as the tokenizer's BOS.")
    mask, cache = keywords.get("attention_mask"), keywords.get("past_key_values")
    if mask is not None and cache is None and mask.shape[-1] != ids_BS.shape[-1]:
        raise DataError(
            f"attention_mask is {mask.shape[-1]} tokens wide and the prompts are {ids_BS.shape[-1]}: pass both as the "
            "tokenizer made them."
        )
    # Padding is not looked at, and may be a token that the tokenizer was given for it.
    seen_BS = ids_BS if mask is None or mask.shape != ids_BS.shape else ids_BS.masked_fill(mask == 0, 0)
    require_known(seen_BS, vocabulary, lambda place: f"prompt {place // ids_BS.shape[-1]}")


@torch.no_grad()
def _resized(weight: nn.Parameter | HostWeight, size: int) -> nn.Parameter | HostWeight:
    table_VD = matrix(weight)
    kept_VD = table_VD[:size]
    mean_D = table_VD.mean(0, dtype=torch.float32).to(table_VD.dtype)
    new_VD = mean_D.expand(size - kept_VD.shape[0], -1)
    table_VD = torch.cat([kept_VD, new_VD])
    if isinstance(weight, HostWeight):
        return HostWeight(table_VD, weight.device)
    return nn.Parameter(table_VD, requires_grad=weight.requires_grad)
