"""A vocabulary of another size than the checkpoint's, for tokens that a tokenizer was given since.

Shapes: V tokens, D width.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jebi.errors import ModelError
from jebi.nn.linear import Linear

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel


def resize(model: "JebiPreTrainedModel", size: int) -> None:
    """Give the embedding, and the head where there is one, ``size`` rows; tied ones stay tied.

    New rows are the mean of the old ones, so that new tokens begin as no token in particular
    (nlp.stanford.edu/~johnhew/vocab-expansion.html, without its noise); rows beyond ``size`` are dropped.

    Raises:
        ModelError: the size is below 1, or the model has an adapter, whose files name the sizes it was made for.
    """
    if size < 1:
        raise ModelError(f"a vocabulary has at least 1 token, not {size}.")
    if size == model.model.shape.vocabulary:
        return
    if model.adapter is not None:
        raise ModelError("resize_token_embeddings comes before get_peft_model: resize the model without its adapter.")
    embedding, head = model.model.embed_tokens, model.get_output_embeddings()
    old_VD = embedding.weight
    embedding.weight = _resized(old_VD, size)
    if isinstance(head, Linear):
        assert isinstance(head.weight, nn.Parameter), "heads are held dense"
        head.weight = embedding.weight if head.weight is old_VD else _resized(head.weight, size)
        head.out_features = size
    model.model.shape = dataclasses.replace(model.model.shape, vocabulary=size)
    model.config.vocab_size = size


@torch.no_grad()
def _resized(table_VD: nn.Parameter, size: int) -> nn.Parameter:
    kept_VD: Tensor = table_VD[:size]
    mean_D = table_VD.mean(0, dtype=torch.float32).to(table_VD.dtype)
    new_VD = mean_D.expand(size - kept_VD.shape[0], -1)
    return nn.Parameter(torch.cat([kept_VD, new_VD]), requires_grad=table_VD.requires_grad)
