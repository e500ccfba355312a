"""A model that scores rows: the decoder with a trained score head in place of the language-model head.

It is transformers' ``AutoModelForSequenceClassification`` with one label, as TRL's `RewardTrainer` takes it, made of
a loaded model whose layers it shares.

Shapes: B batch, S tokens of a padded row, D width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from jebi.errors import ModelError
from jebi.models.hf import Backbone, JebiForCausalLM
from jebi.models.shell import JebiPreTrainedModel


class JebiForSequenceClassification(JebiPreTrainedModel):
    """jebi's decoder with a head that gives each row one score."""

    model: Backbone

    accepts_loss_kwargs = False

    def __init__(self, model: JebiForCausalLM, random_state: int = 3407):
        """Share the decoder of ``model``, its adapter included, and draw a score head to be trained, in float32.

        The draw is transformers': normal, with the config's ``initializer_range``.
        """
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        config.architectures = [
            name.replace("ForCausalLM", "ForSequenceClassification") for name in config.architectures or ()
        ]
        super().__init__(config)
        self.model, self.adapter, self.source, self.places = model.model, model.adapter, model.source, model.places
        generator = torch.Generator().manual_seed(random_state)
        drawn = torch.randn(1, self.model.shape.layer.width, generator=generator) * config.initializer_range
        self.score = nn.Linear(drawn.shape[1], 1, bias=False, device=model.device, dtype=torch.float32)
        with torch.no_grad():
            self.score.weight.copy_(drawn)
        self.name_or_path = model.name_or_path
        self.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, 1) in float32 as ``logits``, read at each row's last token, as transformers finds it.

        That is the last one in ``attention_mask`` that is not ``config.pad_token_id``, where either is given. A pad
        token that is also EOS therefore hides the EOS that ends a row.

        Raises:
            ModelError: ``labels`` were given; losses over scores are the trainer's.
        """
        if labels is not None:
            raise ModelError("labels are not taken by the scoring model: compute the loss from its logits.")
        with torch.autocast(self.device.type, enabled=False):
            outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
            hidden_BSD = outputs.last_hidden_state
            last_B = self._last(input_ids, attention_mask, hidden_BSD)
            rows_B = torch.arange(len(last_B), device=last_B.device)
            scores_B1 = self.score(hidden_BSD[rows_B, last_B].float())
        return SequenceClassifierOutputWithPast(logits=scores_B1, past_key_values=outputs.past_key_values)

    def _last(self, input_ids: Tensor | None, mask_BS: Tensor | None, hidden_BSD: Tensor) -> Tensor:
        """Index of each row's last token."""
        real_BS = torch.ones(hidden_BSD.shape[:2], dtype=torch.bool, device=hidden_BSD.device)
        if mask_BS is not None:
            real_BS &= mask_BS[:, -hidden_BSD.shape[1] :] != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            real_BS &= input_ids != self.config.pad_token_id
        last_B: Tensor = (torch.arange(real_BS.shape[1], device=real_BS.device) * real_BS).argmax(dim=1)
        return last_B
