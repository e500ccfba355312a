"""The shell that transformers knows: a `PreTrainedModel` around the decoder and its head.

It takes what `transformers.Trainer`, TRL and `generate` pass, lays padded batches out as flat rows and back, and
computes the loss over labelled tokens without ever making all logits. Adapter files are written by whatever the
`adapters` room put into ``adapter``.

Shapes: B batch, S tokens of a padded row, T real tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from jebi.errors import ModelError
from jebi.kernels.linear_cross_entropy import LossForm, linear_cross_entropy, softcapped
from jebi.models.cache import growing_cache
from jebi.models.decoder import Decoder
from jebi.models.families import DecoderShape
from jebi.models.files import ModelFiles
from jebi.models.unpadding import IGNORED, Layout, Learnt, lay_out, learnt_of, shift_labels
from jebi.models.vocabulary import resize
from jebi.models.writing import write_base, write_checkpoint
from jebi.nn.linear import Linear
from jebi.nn.rotary import Rotary
from jebi.nn.rows import Rows
from jebi.nn.trained_copy import originals_in_place


class Adapter(Protocol):
    """What the model needs of the adapter it carries."""

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter's files into ``folder``."""
        ...


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
        """
        hidden_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache or past_key_values is not None:
            cache = past_key_values if past_key_values is not None else growing_cache()
            if any(cache.is_sliding):
                raise ModelError("a cache with sliding layers is not available: pass DynamicCache() without a config.")
            return self._with_cache(hidden_BSD, attention_mask, position_ids, cache)
        layout = Layout(None, rows) if rows is not None else lay_out(hidden_BSD, attention_mask, position_ids)
        # Called past the whole model too (by TRL), so autocast is kept out here as well.
        with torch.autocast(hidden_BSD.device.type, enabled=False):
            out_TD = self.forward_rows(layout.flatten(hidden_BSD), layout.rows)
        return BaseModelOutputWithPast(last_hidden_state=layout.restore(out_TD, hidden_BSD.shape[:2]))

    def _with_cache(
        self, hidden_BSD: Tensor, mask_BL: Tensor | None, positions_BS: Tensor | None, cache: Cache
    ) -> BaseModelOutputWithPast:
        new = hidden_BSD.shape[1]
        if positions_BS is None:
            past = cache.get_seq_length()
            positions_BS = torch.arange(past, past + new, device=hidden_BSD.device)[None]
            if mask_BL is not None:
                positions_BS = (mask_BL.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        out_BSD = self.forward_cached(hidden_BSD, positions_BS, mask_BL, cache)
        return BaseModelOutputWithPast(last_hidden_state=out_BSD, past_key_values=cache)


class JebiForCausalLM(PreTrainedModel, GenerationMixin):
    """jebi's decoder with its language-model head."""

    model: Backbone
    lm_head: Linear
    max_seq_length: int
    """Longest row it was loaded for; set by `FastLanguageModel`."""
    source: ModelFiles | None
    """The checkpoint it was filled from, where that holds the weights as they were before any quantisation."""
    auto_checkpointing: bool
    """Whether a training may choose what layers keep."""

    config_class = PretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  (transformers reads a list here)

    def __init__(self, config: PretrainedConfig, shape: DecoderShape, dtype: torch.dtype, rotary: dict[str, Rotary]):
        super().__init__(config)
        config.dtype = dtype
        self.model = Backbone(shape, dtype, rotary)
        self.lm_head = Linear(shape.layer.width, shape.vocabulary, False, dtype)
        self.adapter: Adapter | None = None
        self.source = None
        self._loaded_vocabulary = shape.vocabulary
        self.auto_checkpointing = False
        self.loss_type = "ForCausalLM"
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; trained weights are float32 whatever that is."""
        return self.lm_head.dtype

    def init_weights(self) -> None:
        """Nothing: the weights come from a checkpoint."""

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
        ``return_logits=True`` asks for both. ``shift_labels`` (already shifted), ``num_items_in_batch``,
        ``label_smoothing``, ``rows``, ``counts`` (how often each token counts in the loss) and ``learnt`` (all of that
        at once) are taken as keywords.

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
                logits = softcapped(self.lm_head(hidden_BSD[:, kept]), self.model.shape.logit_softcap)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Where ``generate`` would make transformers' dynamic cache, give it the growing one."""
        if "static" in str(generation_config.cache_implementation):
            raise ModelError("a static cache is not available: leave cache_implementation None; jebi's grows in place.")
        wants_own = generation_config.use_cache and generation_config.cache_implementation is None
        if wants_own and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = growing_cache()
        # Typed for a protocol with settable `device` and `dtype`, which no PreTrainedModel has.
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but rows that outgrow their RoPE's first frequencies begin again with the others."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        if any(rotary.outgrown(past, input_ids.shape[1]) for rotary in self.model.rotary.values()):
            kwargs |= {"past_key_values": growing_cache(), "next_sequence_length": None}
        # Typed for the same protocol as below.
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]

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

    def _loss(self, hidden_BSD: Tensor, learnt: Learnt, kwargs: dict[str, Any]) -> Tensor:
        head = self.lm_head.weight
        total = linear_cross_entropy(
            hidden_BSD.flatten(0, 1).index_select(0, learnt.index_N),
            head if isinstance(head, nn.Parameter) else self.lm_head.dense(),
            learnt.labels_N,
            LossForm(kwargs.get("label_smoothing", 0.0), self.model.shape.logit_softcap),
            learnt.counts_N,
        )
        items = kwargs.get("num_items_in_batch")
        if items is None:
            counts_N = learnt.counts_N
            items = max(1, len(learnt.labels_N)) if counts_N is None else counts_N.sum().clamp(min=1)
        return total / items

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head module."""
        return self.lm_head

    def resize_token_embeddings(  # type: ignore[override]  # jebi's embedding is its own module
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Give the vocabulary ``new_num_tokens`` rows, rounded up as asked, and return the embedding.

        New rows are the mean of the old ones, whatever ``mean_resizing`` says: nothing is drawn.

        Raises:
            ModelError: the size is impossible, or the model has an adapter already.
        """
        size = self.model.shape.vocabulary if new_num_tokens is None else new_num_tokens
        step = pad_to_multiple_of or 1
        resize(self, -(-size // step) * step)
        return self.model.embed_tokens

    @property
    def is_resized(self) -> bool:
        """Whether the vocabulary is no longer the checkpoint's."""
        return self.model.shape.vocabulary != self._loaded_vocabulary

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
        **_: Any,
    ) -> None:
        """Recompute activations in the backward, with ``offload`` from layer inputs in host memory.

        A mode that recomputes already stays. `activation_checkpointing_enable` comes here too.
        """
        if every_n_layers != 1:
            raise ModelError("every_n_layers is not available: jebi recomputes all layers or none. Leave it 1.")
        if self.model.checkpointing == "none":
            self.model.checkpointing = "offload" if offload else "recompute"

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations."""
        self.model.checkpointing = "none"

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.model.checkpointing != "none"

    @property
    def is_activation_checkpointing(self) -> bool:
        """The same under transformers' newer name."""
        return self.is_gradient_checkpointing

    def train(self, mode: bool = True) -> "JebiForCausalLM":
        """As any module's; training drops the copies that were kept for decoding, which it would make stale."""
        if mode:
            self.drop_kept()
        super().train(mode)
        return self

    def drop_kept(self) -> None:
        """Drop the copies that were kept for decoding."""
        for _, linear in self.linears():
            linear.drop_kept()

    def shares_beginnings(self, longest: int) -> bool:
        """Whether beginnings that rows of up to ``longest`` tokens have in common may be computed once."""
        return self.model.shares_beginnings(longest)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every linear map with its full name in the checkpoint."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                yield name, module

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model is the base model: adapters off, the originals of whatever is trained in place."""
        loras = [(linear.lora, linear.lora.enabled) for _, linear in self.linears() if linear.lora is not None]
        for lora, _ in loras:
            lora.enabled = False
        try:
            with originals_in_place(self):
                yield
        finally:
            for lora, enabled in loras:
                lora.enabled = enabled

    def trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are; a 4-bit weight counts its values, not its bytes."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        quantised = sum(
            m.in_features * m.out_features for _, m in self.linears() if not isinstance(m.weight, nn.Parameter)
        )
        return trained, sum(p.numel() for p in self.parameters()) + quantised

    def print_trainable_parameters(self) -> None:
        """Print how much of the model is trained, in PEFT's words."""
        trained, everything = self.trainable_parameters()
        print(
            f"trainable params: {trained:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trained / everything:.4f}"
        )

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write the adapter in PEFT's format, or the whole model in Hugging Face's where there is no adapter.

        The whole model is written in its compute dtype; ``state_dict``, where given, as it is.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is not None:
            self.adapter.save(self, folder)
        else:
            write_checkpoint(self, folder, state_dict)

    def save_base(self, folder: str | PathLike[str]) -> None:
        """Write the model without its adapter, as `writing.write_base` does."""
        write_base(self, Path(folder))
