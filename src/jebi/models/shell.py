"""What transformers asks of every jebi model, whatever stands on its decoder: recomputation, adapters, saving.

The heads are `models.hf`'s and `models.reward`'s. Adapter files are written by whatever the `adapters` room put into
``adapter``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from jebi.config import Places
from jebi.errors import ModelError
from jebi.models.decoder import Decoder
from jebi.models.files import ModelFiles
from jebi.models.vocabulary import resize
from jebi.models.writing import SHARD_SIZE, write_base, write_checkpoint
from jebi.nn.linear import Linear
from jebi.nn.sharding import Codes
from jebi.nn.trained_copy import originals_in_place


class Adapter(Protocol):
    """What the model needs of the adapter it carries."""

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter's files into ``folder``."""
        ...


class JebiPreTrainedModel(PreTrainedModel):
    """A decoder that transformers, TRL and PEFT's files know their way around."""

    model: Decoder
    adapter: Adapter | None = None
    _counted: tuple[int, int] | None = None
    """Parameters, and those of the embedding and the head among them."""
    places: Places = Places()
    """Where embedding and head were asked to be; where they are, `models.placement` says."""
    source: ModelFiles | None = None
    """The checkpoint it was filled from, where that holds the weights as they were before any quantisation."""

    config_class = PretrainedConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  (transformers reads a list here)

    def init_weights(self) -> None:
        """Nothing: the weights come from a checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module."""
        return self.model.embed_tokens

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

    def floating_point_ops(self, input_dict: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Operations of a training step on these tokens, six a parameter (arXiv:2001.08361, section 2.1).

        Trainer asks for them every micro-batch, so the parameters are counted once: counting walks all modules, 7 ms
        for 32 layers, four times a step of 100.
        """
        if self._counted is None:
            shape = self.model.shape
            tables = (1 if shape.tied else 2) * shape.vocabulary * shape.layer.width
            self._counted = self.trainable_parameters()[1], tables
        everything, tables = self._counted
        return 6 * int(input_dict["input_ids"].numel()) * (everything - (tables if exclude_embeddings else 0))

    def train(self, mode: bool = True) -> Self:
        """As any module's; training drops the copies that were kept for decoding, which it would make stale."""
        if mode:
            self.drop_kept()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Where the model is moved. To another dtype it is not cast, and to its own there is nothing to cast.

        `to`, `half`, `float` and the like all come here. They would round weights, and trained float32 masters with
        them, and change nothing of what the layers compute in, which is settled when they are made.

        Raises:
            ModelError: another dtype than the model's is asked for.
        """
        own = self.model.embed_tokens.dtype
        asked = fn(torch.empty(0, dtype=own)).dtype
        if asked != own:
            raise ModelError(
                f"a model in {own} is not cast to {asked}: load it in what it is to compute in, with dtype= "
                "torch.float32, torch.bfloat16 or torch.float16 in from_pretrained."
            )

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)
        return self

    def drop_kept(self) -> None:
        """Drop the copies that were kept for decoding."""
        for _, linear in self.linears():
            linear.drop_kept()

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
        return self.model.shape.vocabulary != self.model.loaded_vocabulary

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
        tables = {self.model.embed_tokens.weight, getattr(self.get_output_embeddings(), "weight", None)}
        beside = sum(t.shape[0] * t.shape[1] for t in tables if t is not None and not isinstance(t, nn.Parameter))
        # Codes are a parameter where several processes share them, and numbers of no meaning.
        codes = {module.laid for module in self.modules() if isinstance(module, Codes)}
        dense = sum(p.numel() for p in self.parameters() if p not in codes)
        return trained, dense + self.packed_values() + beside

    def packed_values(self) -> int:
        """How many numbers of the layers are held in 4 or 8 bits."""
        maps = [linear for _, linear in self.linears() if linear is not self.get_output_embeddings()]
        return sum(m.in_features * m.out_features for m in maps if not isinstance(m.weight, nn.Parameter))

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
        push_to_hub: bool = False,
        max_shard_size: int | str = SHARD_SIZE,
        *_: Any,
        **__: Any,
    ) -> None:
        """Write the adapter in PEFT's format, or the whole model in Hugging Face's where there is no adapter.

        The whole model is written in its compute dtype, ``state_dict``, where given, as it is, in files of at most
        ``max_shard_size``: bytes, or a text such as "2GB". An adapter is one file.

        Raises:
            ModelError: ``push_to_hub`` was asked for.
            ConfigError: ``max_shard_size`` is no size.
        """
        if push_to_hub:
            raise ModelError("save_pretrained writes to a folder: drop push_to_hub=True and call push_to_hub(name).")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is not None:
            self.adapter.save(self, folder)
        else:
            write_checkpoint(self, folder, state_dict, max_shard_size)

    def save_base(self, folder: str | PathLike[str]) -> None:
        """Write the model without its adapter, as `writing.write_base` does."""
        write_base(self, Path(folder))
