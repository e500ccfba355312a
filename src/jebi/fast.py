"""`FastLanguageModel`: the tutorial's verbs, a thin front over the rooms."""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from jebi.adapters import pissa, reference
from jebi.adapters.lora import attach, detach
from jebi.adapters.peft_config import CONFIG_FILE, base_of, other_rope, read_config, takes_from_base
from jebi.adapters.peft_files import read_weights, stored_vocabulary
from jebi.config import (
    TARGET_MODULES,
    Checkpointing,
    Compute,
    EmbeddingPlace,
    HeadPlace,
    LoraConfig,
    ModelConfig,
    launched,
    reject_unknown,
)
from jebi.errors import AdapterError, ConfigError
from jebi.inference.generation import prepare
from jebi.models.compute import require_card, require_layers
from jebi.models.device import default_dtype, device_of
from jebi.models.families import read_config as read_family
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import load_model
from jebi.models.reward import JebiForSequenceClassification
from jebi.models.rope import scale_context
from jebi.models.shares import join
from jebi.models.shell import JebiPreTrainedModel
from jebi.models.tokenizer import beside, ready
from jebi.plan.refusal import Loading, require_model

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=JebiPreTrainedModel)

_SEVERAL = (tuple, set, range)

_CHECKPOINTING: dict[Any, Checkpointing] = {
    False: "none",
    "auto": "none",
    True: "recompute",
    "unsloth": "offload",
}


class FastLanguageModel:
    """Load, adapt, and make ready for answering; nothing to instantiate."""

    @staticmethod
    def from_pretrained(  # noqa: PLR0913  (the script's own argument list)
        model_name: str | Path = "smollm2",
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool | None = None,
        load_in_8bit: bool = False,
        token: str | None = None,
        device: torch.device | str | None = None,
        rope_scaling: dict[str, Any] | None = None,
        full_finetuning: bool = False,
        embedding: EmbeddingPlace = "auto",
        head: HeadPlace = "auto",
        compute: Compute = "auto",
        shard: bool = False,
    ) -> tuple[JebiForCausalLM, PreTrainedTokenizerBase]:
        """Load a model and its tokenizer.

        Args:
            model_name: ``smollm2``, a folder, a .gguf file, a hub id, or a folder that a training wrote, whose base
                model is loaded with its adapter and tokenizer.
            max_seq_length: longest row; beyond the model's own length RoPE is scaled.
            dtype: torch.float32, bfloat16 or float16; None takes what the device computes fastest.
            load_in_4bit: store the projections as NF4; None does, unless ``load_in_8bit`` is True.
            load_in_8bit: store them in 8 bits instead.
            token: hub token for gated models.
            device: "cuda", "cpu" or such; None takes the card where there is one.
            rope_scaling: how RoPE is scaled, in transformers' keys, such as ``{"rope_type": "yarn", "factor": 4.0}``;
                None keeps the model's own, carried on where ``max_seq_length`` exceeds its length.
            full_finetuning: train every weight instead of an adapter; they are float32 and cast to ``dtype``.
            embedding: "card" or "host", whose memory the card reads single rows out of. "auto" is the card, until a
                training's plan finds no room there otherwise.
            head: "card", "host" (copied over in slices) or "auto", likewise; or quantised on the card, "int8" or
                "nf4", which changes what is computed.
            compute: "fp8" multiplies the frozen base in 8-bit floats while training, scaled by rows, on cards of
                compute capability 9.0 and newer; "fp8_backward" in the backward alone; "auto" multiplies in ``dtype``.
            shard: divide the frozen layers among the processes that torchrun or accelerate started on this machine.

        Raises:
            ConfigError: settings exclude each other, or ``compute`` cannot be had here.
            ModelError: the model is not there, or of no known kind; or its one table is to be in two places.
            WeightsError: its weights are incomplete or broken.
            OutOfMemoryError: its weights do not fit; told before any is read, with what would.
        """
        model_name = str(model_name)
        asked = ModelConfig(
            model_name, max_seq_length, load_in_4bit, load_in_8bit, full_finetuning, embedding=embedding, head=head,
            rope_scaling=rope_scaling, compute=compute, shard=shard,
        )  # fmt: skip
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype must be torch.float32, torch.bfloat16, torch.float16 or None, not {dtype!r}.")
        place = device_of(device)
        if compute != "auto":
            require_card(compute, place, dtype or default_dtype(place))
        folder = Path(model_name).expanduser()
        adapter = folder if (folder / CONFIG_FILE).is_file() else None
        base = base_of(adapter) if adapter else model_name
        files = find(base, token)
        with ThreadPoolExecutor(1) as aside:
            if place.type == "cuda":
                # Its context takes up to a second to make, and this thread has the tokenizer to read meanwhile.
                aside.submit(lambda: torch.empty(1, device=place))
            config = files.config()
            if notice := scale_context(config, max_seq_length, rope_scaling):
                logger.warning(notice)
            tokenizer = files.tokenizer()
        kind, mesh = dtype or default_dtype(place), join(place) if shard else None
        shape, world = read_family(config), launched.world(shard)
        require_model(Loading(model_name, shape, asked.storage, kind, asked.places, max_seq_length, world), place)
        model = load_model(files, config, kind, place, asked.storage, asked.places, mesh)
        model.compute = compute
        if generation := files.generation_config():
            model.generation_config = generation
        model.name_or_path = model.config.name_or_path = _named(base)
        tokenizer = beside(adapter, ready(tokenizer, model), model)
        model.max_seq_length = max_seq_length
        if adapter:
            FastLanguageModel.put_adapter(model, adapter)
        return model, tokenizer

    @staticmethod
    def put_adapter(model: _Model, adapter: str | Path) -> _Model:
        """Put a trained adapter, in PEFT's format, on a loaded base model; it can be trained further.

        A vocabulary that was resized for it is resized here too, and a scoring model takes its score head from it.

        Raises:
            AdapterError: the folder holds no LoRA adapter, or one made for another model.
        """
        folder = Path(adapter)
        needs_start = takes_from_base(folder)
        if needs_start:
            pissa.require_dense(model, folder)
        settings, before = read_config(folder), model.model.shape.vocabulary
        if model.adapter is None:
            model.resize_token_embeddings(stored_vocabulary(folder))
        attach(model, settings, fresh=needs_start)
        try:
            read_weights(model, folder)
        except AdapterError:
            detach(model)
            model.resize_token_embeddings(before)
            raise
        if notice := other_rope(folder, model.config):
            logger.warning(notice)
        return model

    @staticmethod
    def get_peft_model(  # noqa: PLR0913  (the script's own argument list)
        model: JebiForCausalLM,
        r: int = 16,
        target_modules: Sequence[str] | str = TARGET_MODULES,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: Literal["none", "all", "lora_only"] = "none",
        use_gradient_checkpointing: bool | Literal["unsloth", "auto"] = "auto",
        random_state: int = 3407,
        use_rslora: bool = False,
        loftq_config: Any = None,
        **settings: Any,
    ) -> JebiForCausalLM:
        """Put a fresh LoRA adapter on the model and return it.

        ``use_gradient_checkpointing``: False keeps all activations, True recomputes them, "unsloth" recomputes and
        keeps layer inputs in host memory, "auto" keeps what fits. ``loftq_config``: a dictionary, or an object with
        the attributes ``loftq_bits`` and ``loftq_iter``. ``settings``: further fields of `LoraConfig`, such as
        ``use_dora``, ``init_lora_weights``, ``modules_to_save``, ``layers_to_transform``.

        Raises:
            AdapterError: the model has an adapter already.
            ConfigError: a setting is impossible or unknown, or a target module does not exist.
        """
        if use_gradient_checkpointing not in _CHECKPOINTING:
            raise ConfigError(
                "use_gradient_checkpointing must be True, False, 'unsloth' or 'auto', "
                f"not {use_gradient_checkpointing!r}."
            )
        reject_unknown(settings, {field.name for field in dataclasses.fields(LoraConfig)}, "")
        if loftq_config is not None and not isinstance(loftq_config, dict):
            loftq_config = {name: getattr(loftq_config, name, None) for name in ("loftq_bits", "loftq_iter")}
        # Only lists go into an adapter's settings file.
        settings = {key: list(value) if isinstance(value, _SEVERAL) else value for key, value in settings.items()}
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            bias=bias,
            use_rslora=use_rslora,
            loftq_config=loftq_config or None,
            random_state=random_state,
            **settings,
        )
        attach(model, config)
        if model.compute != "auto":
            require_layers(model.compute, model.model)
        model.model.checkpointing = _CHECKPOINTING[use_gradient_checkpointing]
        model.auto_checkpointing = use_gradient_checkpointing == "auto"
        return model

    @staticmethod
    def reference_of(model: JebiForCausalLM, with_adapter: bool = True) -> JebiForCausalLM:
        """The model as it answers now, frozen, without a second copy of its weights: ``ref_model`` for TRL's trainers.

        ``with_adapter=False`` gives the base model instead; at the start of a fresh adapter both answer alike.
        """
        return reference.reference_of(model, with_adapter)

    @staticmethod
    def reward_model_of(model: JebiForCausalLM, random_state: int = 3407) -> JebiForSequenceClassification:
        """A model with a score head on the same layers and adapter, as TRL's RewardTrainer trains it."""
        return JebiForSequenceClassification(model, random_state)

    @staticmethod
    def for_inference(model: JebiForCausalLM, rows: Sequence[int] = (1,)) -> JebiForCausalLM:
        """Make the model ready to answer: no dropout, cache on, weights kept as decoding reads them fastest.

        Args:
            model: with an adapter or without.
            rows: for a card: how many prompts will be answered at once. What these numbers need is compiled and
                captured now, and two short answers are made, so that nothing is loaded in the first one that is waited
                for; other numbers work too, and their steps are captured when they come.
        """
        return prepare(model, rows)

    @staticmethod
    def for_training(model: JebiForCausalLM) -> JebiForCausalLM:
        """Make the model ready to train on, undoing `for_inference`."""
        model.train()
        return model


def is_bfloat16_supported() -> bool:
    """Whether a card here computes in bfloat16: Ampere and newer.

    Not so on a CPU, where `TrainingArguments` refuses ``bf16=True``; there the model's own dtype decides.
    """
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _named(base: str) -> str:
    """The name the user gave, so that an adapter saved later can be used on another machine; a folder's whole path."""
    local = Path(base).expanduser()
    return str(local.resolve()) if local.exists() else base
