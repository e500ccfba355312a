"""The decoder: embedding, layers, final norm. One for all families, which differ by `DecoderShape` alone.

It chooses, per pass, between the layers' hand-written and plain forms and what each layer keeps. The head, the loss
and everything transformers expects of a model are `models.hf`.

Shapes: T tokens of all rows, B batch, S new tokens, L cached length, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from jebi.config import Checkpointing, Compute
from jebi.config.limits import CHUNK_TOKENS
from jebi.models.families import DecoderShape
from jebi.nn import few_rows_step, nf4_product
from jebi.nn.attention import attend_cached, attend_rows, seen
from jebi.nn.base_product import BaseProduct, DenseProduct, Scratch
from jebi.nn.embedding import Embedding
from jebi.nn.fp8_product import Fp8Product
from jebi.nn.group import Stacked
from jebi.nn.host_memory import HostMemory
from jebi.nn.layer import DecoderLayer, Norm, stream_scale
from jebi.nn.layer_node import Keep, Keeping, run_layer, run_without_graph, serves
from jebi.nn.layer_step import LayerStep, Now
from jebi.nn.linear import Linear
from jebi.nn.rotary import Rotary, Tables
from jebi.nn.rows import Rows
from jebi.nn.shape import AttentionForm

_KEEP: dict[Checkpointing, Keep] = {
    "none": "all",
    "keep_attention": "input_and_attention",
    "recompute": "input",
    "offload": "input_on_host",
}


class Decoder(nn.Module):
    """Embedding, layers and final norm, named as in Hugging Face checkpoints."""

    layers: nn.ModuleList

    def __init__(self, shape: DecoderShape, dtype: torch.dtype, rotary: dict[str, Rotary]):
        """Build it on the meta device.

        Args:
            shape: sizes and flags.
            dtype: compute dtype.
            rotary: rotary positions by the kind of layer.
        """
        super().__init__()
        self.shape = shape
        self.loaded_vocabulary = shape.vocabulary
        """Tokens that the checkpoint knows."""
        self.embed_tokens = Embedding(shape.vocabulary, shape.layer.width, shape.embedding_scale, dtype)
        self.layers = nn.ModuleList(DecoderLayer(layer, dtype) for layer in shape.layers)
        self._scale = stream_scale(shape.layer, dtype)
        self.norm = Norm(shape.layer.width, shape.layer, dtype, self._scale)
        self.rotary = rotary
        self.checkpointing: Checkpointing = "none"
        self.chunk_tokens = CHUNK_TOKENS
        """Tokens that layers which recompute take at a time, where they may."""
        self.kept_layers = 0
        """Layers, the last ones, that keep everything whatever `checkpointing` says of the others."""
        self.shipped_layers = 0
        """Of the others under ``offload``, evenly spread, those that send gate and up to host memory too."""
        self.plain = False
        """Run the plain form of every layer, for tests and comparisons."""

    @property
    def sharded(self) -> bool:
        """Whether several processes share the layers, each holding a part (`nn.sharding`)."""
        return any(layer.shard is not None for layer in self.decoder_layers())

    def shares_beginnings(self, longest: int) -> bool:
        """Whether rows of up to ``longest`` tokens have equal hidden states where they begin alike."""
        return all(rotary.holds(longest) for rotary in self.rotary.values())

    def forward_rows(self, hidden_TD: Tensor, rows: Rows) -> Tensor:
        """Embedded rows laid end to end -> final hidden states (T, D)."""
        tables = self._tables(lambda rotary: rotary.of_rows(rows, hidden_TD.dtype))
        hidden_TD = self._carried(hidden_TD)
        training = torch.is_grad_enabled() and self.training
        for layer, keeping in zip(self.decoder_layers(), self._keeping(hidden_TD.device)):
            turned = tables[layer.shape.kind]
            # A layer evaluates as it trains, 8-bit floats included.
            if not self.plain and serves(layer) and not torch.is_inference_mode_enabled():
                hidden_TD = run_layer(layer, hidden_TD, turned, rows, keeping)
            elif training and keeping.keep != "all":
                hidden_TD = checkpoint(_plain_rows, layer, hidden_TD, turned, rows, use_reentrant=False)
            else:
                hidden_TD = _plain_rows(layer, hidden_TD, turned, rows)
        out_TD: Tensor = self.norm(hidden_TD) if self.plain else self.norm.lean(hidden_TD)
        return out_TD

    def forward_cached(self, hidden_BSD: Tensor, positions_BS: Tensor, mask_BL: Tensor | None, cache: Cache) -> Tensor:
        """Embedded new tokens -> final hidden states (B, S, D); their keys and values are added to ``cache``.

        Args:
            hidden_BSD: embedded tokens.
            positions_BS: their positions.
            mask_BL: 1 for real tokens among the cached and the new ones, 0 for padding; None when all are real.
            cache: transformers' cache object, whose layers keep all they are given.
        """
        tables = self._tables(lambda rotary: rotary.of_positions(positions_BS, hidden_BSD.dtype))
        hidden_BSD = self._carried(hidden_BSD)
        past, new = cache.get_seq_length(), hidden_BSD.shape[1]
        windows = {layer.attention.window for layer in self.shape.layers}
        masks = {window: _mask(mask_BL, new, past, window, hidden_BSD.device) for window in windows}
        for index, layer in enumerate(self.decoder_layers()):
            form = layer.shape.attention

            def attend(q: Tensor, k: Tensor, v: Tensor, index: int = index, form: AttentionForm = form) -> Tensor:
                k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), index)
                return attend_cached(q, k, v, masks[form.window], form)

            hidden_BSD = layer(hidden_BSD, tables[layer.shape.kind], attend)
        out_BSD: Tensor = self.norm(hidden_BSD)
        return out_BSD

    def forward_prompts(
        self, hidden_TD: Tensor, rows: Rows, take: Callable[[int, Tensor, Tensor], None], last_B: Tensor
    ) -> Tensor:
        """Embedded rows laid end to end -> final hidden states (B, D) of the tokens ``last_B``; no graph.

        ``take`` is given every layer's number and its keys and values (T, G, d).
        """
        tables = self._tables(lambda rotary: rotary.of_rows(rows, hidden_TD.dtype))
        hidden_TD = self._carried(hidden_TD)
        for number, layer in enumerate(self.decoder_layers()):
            turned, chunk = tables[layer.shape.kind], self.chunk_tokens
            hidden_TD = run_without_graph(layer, hidden_TD, turned, rows, chunk, partial(take, number))
        return self.norm.lean(hidden_TD[last_B])

    def forward_step(
        self,
        hidden_BD: Tensor,
        keys_NBGLd: Tensor,
        values_NBGLd: Tensor,
        now: Now,
        step: LayerStep = few_rows_step.few_rows_step,
    ) -> Tensor:
        """One embedded token a row -> final hidden states (B, D); no graph.

        Keys and values of all N layers are in two tensors, to which the new tokens' are written.
        """
        tables = self._tables(lambda rotary: rotary.of_step(now.lengths_B, now.reach, hidden_BD.dtype))
        hidden_BD = self._carried(hidden_BD)
        for layer, keys_BGLd, values_BGLd in zip(self.decoder_layers(), keys_NBGLd, values_NBGLd):
            hidden_BD = step(layer, hidden_BD, tables[layer.shape.kind], keys_BGLd, values_BGLd, now)
        return self.norm.lean(hidden_BD)

    def _keeping(self, device: torch.device) -> Iterator[Keeping]:
        """What each layer keeps of a pass."""
        # Without a backward nothing is kept anyway, and in chunks a row costs no more to evaluate than to train on.
        keep = _KEEP[self.checkpointing] if torch.is_grad_enabled() else "input"
        on_host = keep == "input_on_host"
        # Gradients between layers are read by the next layer alone.
        saving = Keeping(keep, self.chunk_tokens, HostMemory(device) if on_host else None, spend_gradient=True)
        # On a stream of their own: what is narrow and needed soon would wait for what is wide.
        shipping = replace(saving, wide=HostMemory(device, lane=1) if on_host and self.shipped_layers else None)
        whole = replace(saving, keep="all" if torch.is_grad_enabled() else keep, host=None)
        others, sent = len(self.layers) - self.kept_layers, self.shipped_layers
        for number in range(others):
            yield shipping if (number + 1) * sent // others > number * sent // others else saving
        yield from [whole] * self.kept_layers

    def _carried(self, embedded: Tensor) -> Tensor:
        """Embedded tokens as the residual stream begins."""
        return embedded if self._scale == 1 else embedded * self._scale

    def stack(self, keep: bool, compute: Compute = "auto", answering: bool = False) -> None:
        """Lay every layer's maps together: for training on a card, or for answering anywhere.

        Args:
            keep: whether packed weights are kept as they are multiplied, instead of made so at every use.
            compute: how the frozen weights are multiplied; who may ask for 8-bit floats is `models.compute`'s.
            answering: whether the layers are only to answer.
        """
        stay = not self.sharded
        scratch = None if keep and stay else Scratch()

        def base_of(maps: list[Linear]) -> BaseProduct:
            if compute != "auto":
                return Fp8Product(maps, scratch, forward=compute == "fp8")
            dense = DenseProduct(maps, scratch, stay)
            return nf4_product.answering(maps, dense) if answering else dense

        for layer in self.decoder_layers():
            layer.stack(base_of, answering)

    def unstack(self) -> None:
        """Forget what `stack` laid together and steps looked up; dense weights stay parts of one matrix."""
        for layer in self.decoder_layers():
            layer.stacked = layer.answering = layer.few_rows = None
        for rotary in self.rotary.values():
            rotary.forget()

    def cast_adapters(self, again: bool) -> None:
        """Cast the adapters of stacked layers to the compute dtype.

        ``again`` launches the casts whatever has changed; without it they are only noted as done, for a caller that
        replays them.
        """
        for layer in self.decoder_layers():
            if layer.stacked is not None:
                for group in layer.stacked.stacked():
                    group.cast() if again else group.note()

    def answering_groups(self) -> Iterator[Stacked]:
        """The groups that all layers answer with, where their maps are laid together for that."""
        for layer in self.decoder_layers():
            if layer.answering is not None:
                yield from layer.answering.stacked()

    def lay_for_few_rows(self) -> None:
        """Lay the groups' weights as they are stored, for steps of few rows on a card (`nn.few_rows_step`)."""
        for layer in self.decoder_layers():
            few_rows_step.lay(layer)

    def decoder_layers(self) -> Iterator[DecoderLayer]:
        """The layers, typed."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            yield layer

    def _tables(self, make: Callable[[Rotary], Tables]) -> dict[str, Tables]:
        """Rotary tables of each kind of layer that the model has, made once where kinds have the same."""
        made: dict[int, Tables] = {}
        tables: dict[str, Tables] = {}
        for kind in {layer.kind for layer in self.shape.layers}:
            rotary = self.rotary[kind]
            if id(rotary) not in made:
                made[id(rotary)] = make(rotary)
            tables[kind] = made[id(rotary)]
        return tables


def _plain_rows(layer: DecoderLayer, hidden_TD: Tensor, tables: Tables, rows: Rows) -> Tensor:
    form = layer.shape.attention
    out_TD: Tensor = layer(hidden_TD, tables, lambda q, k, v: attend_rows(q, k, v, rows, form))
    return out_TD


def _mask(mask_BL: Tensor | None, new: int, past: int, window: int | None, device: torch.device) -> Tensor | None:
    """(B or 1, S, L) booleans where a new token may look, or None when plain causality says it all."""
    length = past + new
    padded = mask_BL is not None and not bool(mask_BL.all())
    if window is not None and window >= length:
        window = None
    if not padded and window is None and (past == 0 or new == 1):
        return None
    causal_SL = seen(new, length, past, window, device)
    if mask_BL is None or not padded:
        return causal_SL[None]
    allowed_BSL = causal_SL[None] & F.pad(mask_BL, (0, length - mask_BL.shape[1]), value=1)[:, None].bool()
    # A padding token in front of a row may look at nothing; letting it see itself keeps its softmax finite.
    itself_SL = seen(new, length, past, 1, device)
    return allowed_BSL | itself_SL[None]
