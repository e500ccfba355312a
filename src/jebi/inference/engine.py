"""The decoding engine: prompts in one pass of flat rows, then a token a row at a time over a static cache.

On a card a step is captured as a CUDA graph, one for each number of rows and step of the cache's size, and replayed.
Where a step depends on numbers of the host (RoPE that follows a row's length, a head in host memory) it runs
uncaptured, as on a CPU. It knows token ids and logits alone; which token is taken is `decoding`'s.

Shapes: B rows, S tokens of a left-padded row, T tokens of all rows, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from jebi.inference.kv_cache import STEP, StaticCache, slots_for
from jebi.models.hf import JebiForCausalLM
from jebi.nn.attention import varlen_serves
from jebi.nn.few_rows_step import few_rows_step
from jebi.nn.host_weight import HostWeight
from jebi.nn.layer_step import LayerStep, Now
from jebi.nn.rows import rows_from_lengths

WARM_TOKENS = 8192
"""Longest row for which steps are captured beforehand."""
_KEPT = 4
"""Numbers of rows for which cache and graphs are kept from one answer to the next."""
_SHARE = 4
"""Caches that are kept, or one that is made as large as it may become, take no more than this part of the card."""


@dataclass
class _Batch:
    """The buffers of one number of rows; where graphs read them, they stay where they are."""

    cache: StaticCache
    ids_B: Tensor
    """The tokens of the step."""
    lengths_B: Tensor
    """Tokens that each row has in the cache, int64."""
    lengths: list[int] = field(default_factory=list)
    """The same on the host."""
    graphs: dict[Any, tuple[Any, Tensor]] = field(default_factory=dict)
    """Captured steps and their logits, by slots looked at and what else they were captured over."""
    pool: Any = None
    """The memory that the graphs share."""

    def reserve(self, tokens: int) -> None:
        """Make room; graphs over buffers that had to move are gone."""
        if self.cache.reserve(tokens):
            self.graphs.clear()
            # torch refuses a pool without graphs as long as a tensor of it lives, which the last logits do.
            self.pool = None


class Engine:
    """Answers with one model, which every call is given again: it holds buffers and graphs, and no weights."""

    def __init__(self, step: LayerStep = few_rows_step):
        """``step`` is how a layer takes a token."""
        self._step = step
        self._batches: dict[int, _Batch] = {}
        self._batch: _Batch | None = None
        self._over: tuple[int, ...] = ()
        self._warm: set[Any] = set()
        self.warm_up_seconds = 0.0
        """What `warm_up` took."""

    def prefill(self, model: JebiForCausalLM, ids_BS: Tensor, lengths: list[int], most: int) -> Tensor:
        """Begin with prompts; logits (B, V) of the token after each.

        Args:
            model: made ready to answer.
            ids_BS: token ids, rows padded on the left.
            lengths: tokens of each row without padding.
            most: tokens of the longest row when all is answered.
        """
        device = model.device
        batch = self._batch = self._batch_of(model, len(lengths), max(lengths), most)
        with torch.inference_mode(False):
            for group in model.model.answering_groups():
                group.refresh()
        self._over = _addresses(model) if captures(model) else ()
        rows = rows_from_lengths(lengths, device)
        if varlen_serves(device, model.dtype):
            # One kernel for rows alone and together, and for every length: cuDNN would plan each anew.
            rows = replace(rows, cu=rows.cu_seqlens())
        counts_B = torch.tensor(lengths, device=device)
        places = None
        if len(set(lengths)) > 1:
            row_T = torch.arange(len(lengths), device=device).repeat_interleave(counts_B, output_size=sum(lengths))
            places = row_T, rows.positions_U
        flat_T = torch.cat([row[-length:] for row, length in zip(ids_BS, lengths)])
        out_BD = model.model.forward_prompts(
            model.model.embed_tokens(flat_T),
            rows,
            lambda layer, k, v: batch.cache.write(layer, places, k, v),
            counts_B.cumsum(0) - 1,
        )
        batch.lengths_B.copy_(counts_B)
        batch.lengths = [*lengths]
        return model.logits_of(out_BD)

    def step(self, model: JebiForCausalLM, ids_BS: Tensor) -> Tensor:
        """Logits (B, V) of the token after ``ids_BS``, all tokens so far; the next step writes over them."""
        batch = self._batch
        assert batch is not None, "a prompt comes first"
        longer = [length + 1 for length in batch.lengths]
        if any(rotary.outgrown(n - 1, n) for rotary in model.model.rotary.values() for n in longer):
            return self.prefill(model, ids_BS, longer, max(longer))
        longest = max(longer)
        batch.ids_B.copy_(ids_BS[:, -1])
        batch.reserve(longest)
        if captures(model):
            logits_BV = self._replay(model, batch, min(slots_for(longest), batch.cache.slots))
        else:
            logits_BV = self._forward(model, batch, longest, even=min(longer) == longest)
        batch.lengths = longer
        return logits_BV

    def release(self, model: JebiForCausalLM) -> None:
        """Let go of the buffers of an answer, unless graphs over them are worth keeping."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        if not captures(model) or batch.cache.nbytes > _share_of(model.device):
            self._batches = {rows: kept for rows, kept in self._batches.items() if kept is not batch}
            return
        # Behind the answer, where nobody waits for it.
        batch.cache.clear()
        # The oldest goes first; this one is the last.
        while sum(kept.cache.nbytes for kept in self._batches.values()) > _share_of(model.device):
            del self._batches[next(iter(self._batches))]

    @torch.no_grad()
    def warm_up(self, model: JebiForCausalLM, tokens: int, rows: Sequence[int] = (1,)) -> None:
        """Compile what prompts of these numbers of rows need, and capture their steps up to so many tokens a row."""
        began = time.perf_counter()
        tokens = min(tokens, WARM_TOKENS)
        for count in rows:
            ids_BS = torch.zeros(count, 2, dtype=torch.long, device=model.device)
            self.prefill(model, ids_BS, [2] * count, tokens)
            batch = self._batch
            assert batch is not None
            reach = STEP
            while captures(model) and reach <= batch.cache.slots:
                for _ in range(2):  # uncaptured at first
                    batch.lengths_B.fill_(2)
                    self._replay(model, batch, reach)
                reach *= 2
            self.release(model)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        self.warm_up_seconds += time.perf_counter() - began

    def _batch_of(self, model: JebiForCausalLM, rows: int, longest: int, most: int) -> _Batch:
        """The buffers of so many rows, with room for these and, where steps are captured, for what is to come."""
        # Buffers outlive the call, which may be under inference_mode: such tensors could not be written to later.
        with torch.inference_mode(False):
            batch = self._batches.pop(rows, None)
            if batch is None:
                cache = StaticCache(model.model.shape, rows, model.dtype, model.device)
                ids_B, lengths_B = torch.zeros(2, rows, dtype=torch.long, device=model.device)
                batch = _Batch(cache, ids_B, lengths_B)
            self._batches[rows] = batch
            while len(self._batches) > _KEPT:
                del self._batches[next(iter(self._batches))]
            if captures(model) and batch.cache.bytes_for(slots_for(most)) <= _share_of(model.device):
                batch.reserve(most)
            batch.reserve(longest + 1)
        return batch

    def _forward(self, model: JebiForCausalLM, batch: _Batch, reach: int, even: bool = False) -> Tensor:
        """A step of device tensors alone."""
        cache = batch.cache
        hidden_BD = model.model.embed_tokens(batch.ids_B)
        now = Now(batch.lengths_B, reach, even)
        out_BD = model.model.forward_step(hidden_BD, cache.keys_NBGLd, cache.values_NBGLd, now, self._step)
        logits_BV = model.logits_of(out_BD)
        batch.lengths_B += 1
        return logits_BV

    def _replay(self, model: JebiForCausalLM, batch: _Batch, reach: int) -> Tensor:
        if (reach, self._over) not in batch.graphs:
            # Kernels are compiled and libraries set up at their first use, which must not be captured.
            first = len(batch.lengths), reach, self._over
            if first not in self._warm:
                self._warm.add(first)
                return self._forward(model, batch, reach)
            self._capture(model, batch, reach)
        graph, logits_BV = batch.graphs[reach, self._over]
        graph.replay()
        return logits_BV

    def _capture(self, model: JebiForCausalLM, batch: _Batch, reach: int) -> None:
        if batch.pool is None:
            batch.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Whatever other threads do on the card meanwhile is not of this capture.
        with torch.cuda.graph(graph, pool=batch.pool, capture_error_mode="thread_local"):
            logits_BV = self._forward(model, batch, reach)
        batch.graphs[reach, self._over] = graph, logits_BV


def captures(model: JebiForCausalLM) -> bool:
    """Whether a step of this model can be captured: nothing in it waits for the host or asks it."""
    table = model.model.embed_tokens.weight
    return (
        model.device.type == "cuda"
        and all(rotary.reach is None for rotary in model.model.rotary.values())
        and not isinstance(model.lm_head.weight, HostWeight)
        and (not isinstance(table, HostWeight) or table.locked)
    )


def _addresses(model: JebiForCausalLM) -> tuple[int, ...]:
    """What may be exchanged between two answers, by place and size: the adapters that are on, embedding, head."""
    casts = [group.casts() for group in model.model.answering_groups()]
    found = [cast.data_ptr() for pair in casts if pair is not None for cast in pair]
    for module in (model.model.embed_tokens, model.lm_head):
        for tensor in (*module.parameters(), *module.buffers()):
            found += tensor.data_ptr(), tensor.nbytes
    return tuple(found)


def _share_of(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory) // _SHARE
