"""The shell that transformers knows: a `PreTrainedModel` around the decoder and its head.

It takes what `transformers.Trainer`, TRL and `generate` pass, lays padded batches out as flat rows and back, and
computes the loss over labelled tokens without ever making all logits. What a model does whatever its head is
`models.shell`'s.

Shapes: B batch, S tokens of a padded row, T real tokens, D width, V vocabulary.
"""

import logging
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from jebi.config import Compute
from jebi.errors import ModelError
from jebi.kernels.linear_cross_entropy import LossForm, linear_cross_entropy, softcapped
from jebi.kernels.sliced_cross_entropy import sliced_cross_entropy
from jebi.models.cache import GrowingCache
from jebi.models.decoder import Decoder
from jebi.models.families import DecoderShape
from jebi.models.shell import JebiPreTrainedModel
from jebi.models.unpadding import IGNORED, Layout, Learnt, lay_out, learnt_of, padding_mask, shift_labels
from jebi.models.vocabulary import require_prompts
from jebi.nn.linear import Linear
from jebi.nn.rotary import Rotary
from jebi.nn.rows import Rows
from jebi.nn.slices import WeightSlices, sliced_product

logger = logging.getLogger(__name__)


class Backbone(Decoder):
    """The decoder behind transformers' signature, as TRL and `PreTrainedModel.base_model` call it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        rows: Rows | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Final hidden states (B, S, D), zero at padding.

        ``rows`` may be given with a batch of one row of flat tokens; it spares finding the boundaries again.

        Raises:
            ModelError: both ``input_ids`` and ``inputs_embeds`` were given, or neither; or a mask that is not taken.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelError("give input_ids or inputs_embeds, one of the two.")
        if use_cache or past_key_values is not None:
            cache = past_key_values if past_key_values is not None else GrowingCache()
            if any(cache.is_sliding):
                raise ModelError("a cache with sliding layers is not available: pass DynamicCache() without a config.")
            return self._with_cache(self._embedded(input_ids, inputs_embeds), attention_mask, position_ids, cache)
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        layout = Layout(None, rows) if rows is not None else lay_out(given, attention_mask, position_ids)
        # Called past the whole model too (by TRL), so autocast is kept out here as well.
        with torch.autocast(given.device.type, enabled=False):
            # No name for the embedded tokens: they are as large as any activation, and gone with the first layer.
            out_TD = self.forward_rows(layout.flatten(self._embedded(input_ids, inputs_embeds)), layout.rows)
        return BaseModelOutputWithPast(last_hidden_state=layout.restore(out_TD, given.shape[:2]))

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        embedded_BSD: Tensor = self.embed_tokens(input_ids)
        return embedded_BSD

    def _with_cache(
        self, hidden_BSD: Tensor, mask_BL: Tensor | None, positions_BS: Tensor | None, cache: Cache
    ) -> BaseModelOutputWithPast:
        new = hidden_BSD.shape[1]
        if mask_BL is not None:
            mask_BL = padding_mask(mask_BL)
        if positions_BS is None:
            past = cache.get_seq_length()
            positions_BS = torch.arange(past, past + new, device=hidden_BSD.device)[None]
            if mask_BL is not None:
                positions_BS = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        out_BSD = self.forward_cached(hidden_BSD, positions_BS, mask_BL, cache)
        return BaseModelOutputWithPast(last_hidden_state=out_BSD, past_key_values=cache)


class Decoding(Protocol):
    """Another way through ``generate``'s loop of tokens than transformers', which serves most of what is asked."""

    def serves(
        self, model: "JebiForCausalLM", input_ids: Tensor, config: GenerationConfig, keywords: dict[str, Any]
    ) -> bool:
        """Whether it serves this call, ``keywords`` being what the model's forward would be given."""
        ...

    def answer(
        self,
        model: "JebiForCausalLM",
        input_ids: Tensor,
        mask_BS: Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> Tensor:
        """Prompts and answers, as ``generate`` returns them."""
        ...


class JebiForCausalLM(JebiPreTrainedModel, GenerationMixin):
    """jebi's decoder with its language-model head."""

    model: Backbone
    lm_head: Linear
    max_seq_length: int
    """Longest row it was loaded for; set by `FastLanguageModel`."""
    auto_checkpointing: bool
    """Whether a training may choose what layers keep."""
    compute: Compute
    """What multiplies by the frozen base in training."""
    decoding: Decoding | None = None
    """How tokens are made where transformers' loop need not; put here when the model is made ready to answer."""
    _undone = False
    """Whether training took that away, and nothing was answered since."""

    accepts_loss_kwargs = True

    def __init__(self, config: PretrainedConfig, shape: DecoderShape, dtype: torch.dtype, rotary: dict[str, Rotary]):
        super().__init__(config)
        config.dtype = dtype
        self.model = Backbone(shape, dtype, rotary)
        self.lm_head = Linear(shape.layer.width, shape.vocabulary, False, dtype)
        self.auto_checkpointing = False
        self.compute = "auto"
        self.loss_type = "ForCausalLM"
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; trained weights are float32 whatever that is."""
        return self.lm_head.dtype

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As transformers' causal language models, with these differences.

        With labels only the loss is returned, since making the logits would cost more memory than the training;
        ``return_logits=True`` asks for both. Labels after padding and across restarting positions are not learnt.
        Keys and values are kept only where ``use_cache=True`` asks for them. ``shift_labels`` (already shifted),
        ``num_items_in_batch``, ``label_smoothing``, ``rows``, ``counts`` (how often each token counts in the loss) and
        ``learnt`` (all of that at once) are taken as keywords.

        Raises:
            ModelError: hidden states or attention weights were asked for, which jebi never holds.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ModelError("output_hidden_states and output_attentions are not available: jebi does not keep them.")
        # The model computes in its own dtype: autocast around it (Trainer's bf16=True) must not recast its parts.
        with torch.autocast(self.device.type, enabled=False):
            outputs = self.model(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                use_cache,
                kwargs.get("rows"),
            )
            hidden_BSD = outputs.last_hidden_state
            learnt = self._learnt(labels, attention_mask, position_ids, kwargs)
            loss = self._loss(hidden_BSD, learnt, kwargs) if learnt is not None else None
            logits = None
            if loss is None or kwargs.get("return_logits"):
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                logits = self.logits_of(hidden_BSD[:, kept])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., D)."""
        return softcapped(self._product(hidden), self.model.shape.logit_softcap)

    def train(self, mode: bool = True) -> Self:
        """As any model's; training undoes what was done to answer faster."""
        if mode and self.decoding is not None:
            self.decoding, self._undone = None, True
            self.model.unstack()
        super().train(mode)
        return self

    def __getstate__(self) -> Any:
        """What copies and pickles are made of; torch's own in training and as loaded.

        Raises:
            ModelError: the model was made ready to answer, with buffers and captured steps that belong to it alone.
        """
        if self.decoding is not None:
            raise ModelError(
                "a model that was made ready to answer is not copied or pickled: call FastLanguageModel.for_training("
                "model) first, and for_inference afterwards; or write it with save_pretrained."
            )
        return super().__getstate__()

    def _sample(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """``generate``'s loop for greedy and sampled answers: through `decoding` where that serves the call."""
        ours = self.decoding
        if ours is None and self._undone:
            self._undone = False
            logger.warning("training undid what made answers fast: call FastLanguageModel.for_inference(model) again")
        if ours is not None and not synced_gpus and ours.serves(self, input_ids, generation_config, model_kwargs):
            mask_BS = model_kwargs.get("attention_mask")
            return ours.answer(
                self, input_ids, mask_BS, logits_processor, stopping_criteria, generation_config, streamer
            )
        return super()._sample(  # type: ignore[misc]  # for the same reason as below
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which stumbles over prompts without tokens, or with unknown ones, much later."""
        inputs, name, others = super()._prepare_model_inputs(*args, **kwargs)  # type: ignore[misc]
        if name == "input_ids":
            require_prompts(inputs, others, self.model.shape.vocabulary)
        return inputs, name, others

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Where ``generate`` would make transformers' dynamic cache, give it the growing one."""
        if "static" in str(generation_config.cache_implementation):
            raise ModelError("a static cache is not available: leave cache_implementation None; jebi's grows in place.")
        wants_own = generation_config.use_cache and generation_config.cache_implementation is None
        if wants_own and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = GrowingCache(of_generate=True)
        # Typed for a protocol with settable `device` and `dtype`, which no PreTrainedModel has.
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As transformers', but the batch begins again when a row outgrows its RoPE's first frequencies.

        ``inputs_embeds`` has a name here because ``generate`` looks for it.
        """
        cache, mask_BL = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        # Beside embeddings the ids are those of the answer alone.
        length = input_ids.shape[1] if inputs_embeds is None else past + 1
        if past and self._outgrown(past, length, mask_BL):
            if inputs_embeds is not None:
                raise ModelError(
                    "a row outgrew its RoPE's first frequencies and would begin again from its tokens, which "
                    "inputs_embeds do not tell: pass input_ids."
                )
            kwargs |= {"past_key_values": GrowingCache(), "next_sequence_length": None}
        # Typed for the same protocol as below.
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)  # type: ignore[misc]

    def _outgrown(self, past: int, length: int, mask_BL: Tensor | None) -> bool:
        """Whether a row needs other frequencies at ``length`` tokens than at ``past``, its padding not counted."""
        rotaries = [rotary for rotary in self.model.rotary.values() if rotary.restarts]
        if not rotaries:
            return False
        sizes = {(past, length)}
        if mask_BL is not None:
            sizes = set(zip(mask_BL[:, :past].sum(1).tolist(), mask_BL.sum(1).tolist()))
        return any(rotary.outgrown(*size) for rotary in rotaries for size in sizes)

    def _learnt(
        self, labels: Tensor | None, mask_BS: Tensor | None, positions_BS: Tensor | None, kwargs: dict[str, Any]
    ) -> Learnt | None:
        """What is to be learnt, however the caller says it; None where nothing is said."""
        if (given := kwargs.get("learnt")) is not None:
            assert isinstance(given, Learnt)
            return given
        shifted_BS = kwargs.get("shift_labels")
        if shifted_BS is None:
            if labels is None:
                return None
            shifted_BS = shift_labels(labels, positions_BS)
        if mask_BS is not None:
            # Padding in front of a row predicts nothing, not even the row's first token.
            shifted_BS = shifted_BS.masked_fill(mask_BS == 0, IGNORED)
        return learnt_of(shifted_BS, kwargs.get("counts"))

    def _product(self, hidden: Tensor) -> Tensor:
        """The head's output; a head that is not dense comes in slices."""
        if (slices := self._slices()) is not None:
            return sliced_product(hidden, slices)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def _slices(self) -> WeightSlices | None:
        weight = self.lm_head.weight
        if self.lm_head.is_dense or isinstance(weight, nn.Parameter):
            return None
        return WeightSlices(weight, self.lm_head.dtype)

    def _loss(self, hidden_BSD: Tensor, learnt: Learnt, kwargs: dict[str, Any]) -> Tensor:
        form = LossForm(kwargs.get("label_smoothing", 0.0), self.model.shape.logit_softcap)
        hidden_TD = hidden_BSD.flatten(0, 1)
        if (slices := self._slices()) is not None:
            hidden_ND = hidden_TD.index_select(0, learnt.index_N)
            total = sliced_cross_entropy(hidden_ND, slices, learnt.labels_N, form, learnt.counts_N)
        else:
            head = self.lm_head.weight
            weight_VD = head if isinstance(head, nn.Parameter) else self.lm_head.dense()
            total = linear_cross_entropy(hidden_TD, weight_VD, learnt.labels_N, form, learnt.counts_N, learnt.index_N)
        items = kwargs.get("num_items_in_batch")
        if items is None:
            counts_N = learnt.counts_N
            items = max(1, len(learnt.labels_N)) if counts_N is None else counts_N.sum().clamp(min=1)
        return total / items

    def get_output_embeddings(self) -> nn.Module:
        """The head module."""
        return self.lm_head
