"""A vocabulary of another size than the checkpoint's, for tokens that a tokenizer was given since.

Shapes: V tokens, D width.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from jebi.errors import ModelError
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
