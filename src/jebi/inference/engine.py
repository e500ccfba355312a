"""The decoding engine: prompts in one pass (`prefill`), then a token a row at a time over a static cache.

On a card a step is captured as a CUDA graph, one for each number of rows and step of the cache's size, and replayed.
So are short prompts, padded to one of a few sizes, of the numbers of rows that were asked for beforehand. Where a step
depends on numbers of the host (RoPE that follows a row's length, a head in host memory) all runs uncaptured, as on a
CPU. It knows token ids and logits alone; which token is taken is `decoding`'s.

Shapes: B rows, S tokens of a left-padded row, T tokens of all rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jebi.inference.kv_cache import STEP, StaticCache, slots_for
from jebi.inference.prefill import PaddedPrompts, flat_prompts, pads, sizes
from jebi.models.hf import JebiForCausalLM
from jebi.nn.few_rows_step import few_rows_step, products
from jebi.nn.host_weight import HostWeight
from jebi.nn.layer_step import LayerStep, Now

WARM_TOKENS = 8192
"""Longest row for which steps are captured beforehand."""
_KEPT = 4
"""Numbers of rows for which cache and graphs are kept from one answer to the next; more where more were asked for."""
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
    """What is captured and its logits: steps by slots looked at, prompts by size, and what else they are over."""
    pool: Any = None
    """The memory that the graphs share."""
    lasts: bool = False
    """Whether it is to be kept behind the answer, so that graphs of what an answer does once are worth it."""
    padded: dict[int, PaddedPrompts] = field(default_factory=dict)
    """What prompts are padded into, by size."""

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
        self._rows: set[int] = set()
        """Numbers of rows whose prompts are captured."""

    def prefill(self, model: JebiForCausalLM, ids_BS: Tensor, lengths: list[int], most: int) -> Tensor:
        """Begin with prompts; logits (B, V) of the token after each, which the next step writes over.

        Args:
            model: made ready to answer.
            ids_BS: token ids, rows padded on the left.
            lengths: tokens of each row without padding.
            most: tokens of the longest row when all is answered.
        """
        batch = self._begin(model, lengths, most)
        size = self._size(model, batch, max(lengths))
        if size is None:
            return flat_prompts(model, batch.cache, ids_BS, lengths)
        if size not in batch.padded:
            with torch.inference_mode(False):  # as in `_batch_of`
                batch.padded[size] = PaddedPrompts(model, len(lengths), size)
        padded = batch.padded[size]
        padded.fill(ids_BS, lengths)
        run = partial(padded.forward, model, batch.cache, batch.lengths_B)
        return self._replay(batch, ("prompts", size), run)

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
            logits_BV = self._stepped(model, batch, min(slots_for(longest), batch.cache.slots))
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
        """Compile what prompts of these numbers of rows need, and capture them and their steps.

        Steps are captured up to so many tokens a row, or as many as leave room for the caches of all of them, and short
        prompts that leave room for an answer in these.
        """
        rows = tuple(dict.fromkeys(rows))
        tokens = _within_share(model, max(2, min(tokens, WARM_TOKENS)), sum(rows))
        self._rows.update(rows)
        self._compile(model, tokens, rows)
        for count in rows:
            batch = self._warm_prompts(model, tokens, count)
            reach = STEP
            while captures(model) and reach <= batch.cache.slots:
                for _ in range(2):  # uncaptured at first
                    batch.lengths_B.fill_(2)
                    self._stepped(model, batch, reach)
                reach *= 2
            self.release(model)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    def _compile(self, model: JebiForCausalLM, tokens: int, rows: Sequence[int]) -> None:
        """Run prompts once, uncaptured, and compile steps beside them: much of a compilation is not Python's."""
        _refresh(model)
        self._warm.clear()  # or what comes again would be captured while other threads compile
        threads = ThreadPoolExecutor()
        try:
            aside = [threads.submit(_aside, model.device, run) for run in self._parts_of_steps(model, rows)]
            for count in rows:
                batch = self._warm_prompts(model, tokens, count)
                flat_prompts(model, batch.cache, batch.ids_B.new_zeros(count, 2), [2] * count)
                self.release(model)
            for part in aside:
                part.result()
        finally:
            threads.shutdown(cancel_futures=True)

    def _parts_of_steps(self, model: JebiForCausalLM, rows: Sequence[int]) -> list[Callable[[], object]]:
        """Steps of these numbers of rows as far as the head, over buffers of their own, and products of theirs.

        Where all that a step writes is its own: other steps dequantise into one buffer, as prompts do.
        """
        layers, parts = list(model.model.decoder_layers()), list[Callable[[], object]]()
        if not captures(model) or any(layer.few_rows is None for layer in layers):
            return parts
        with torch.inference_mode(False):  # as in `_batch_of`
            for count in rows:
                if few := products(layers[0], count):
                    batch = _empty(model, count)
                    batch.reserve(STEP)
                    hidden_BD, cache = model.model.embed_tokens(batch.ids_B), batch.cache
                    now = Now(batch.lengths_B, STEP)
                    step = partial(model.model.forward_step, hidden_BD, cache.keys_NBGLd, cache.values_NBGLd, now)
                    parts += partial(step, self._step), *few
        return parts

    def _warm_prompts(self, model: JebiForCausalLM, tokens: int, rows: int) -> _Batch:
        """Prompts of every size, of so many rows; those that are captured are so when they come for the second time."""
        ids_BS = torch.zeros(rows, tokens, dtype=torch.long, device=model.device)
        batch = self._begin(model, [2] * rows, tokens)
        for size in sizes(rows):
            longest = min(size, tokens - 1)
            if self._size(model, batch, longest) == size:
                self.prefill(model, ids_BS, [longest] * rows, tokens)
        return batch

    def _begin(self, model: JebiForCausalLM, lengths: list[int], most: int) -> _Batch:
        """The buffers of an answer to prompts of so many tokens, and the adapters as they are now."""
        batch = self._batch = self._batch_of(model, len(lengths), max(lengths), most)
        _refresh(model)
        self._over = _addresses(model) if captures(model) else ()
        batch.lengths_B.copy_(torch.tensor(lengths))
        batch.lengths = [*lengths]
        return batch

    def _size(self, model: JebiForCausalLM, batch: _Batch, longest: int) -> int | None:
        """What prompts are padded to for a captured pass; None where they go as they are."""
        rows = len(batch.lengths)
        if not batch.lasts or rows not in self._rows or not pads(model):
            return None
        return next((size for size in sizes(rows) if size >= longest), None)

    def _batch_of(self, model: JebiForCausalLM, rows: int, longest: int, most: int) -> _Batch:
        """The buffers of so many rows, with room for these and, where steps are captured, for what is to come."""
        # Buffers outlive the call, which may be under inference_mode: such tensors could not be written to later.
        with torch.inference_mode(False):
            batch = self._batches.pop(rows, None)
            self._batches[rows] = batch = batch or _empty(model, rows)
            while len(self._batches) > max(_KEPT, len(self._rows)):
                del self._batches[next(iter(self._batches))]
            batch.lasts = captures(model) and batch.cache.bytes_for(slots_for(most)) <= _share_of(model.device)
            if batch.lasts:
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

    def _stepped(self, model: JebiForCausalLM, batch: _Batch, reach: int) -> Tensor:
        return self._replay(batch, ("step", reach), partial(self._forward, model, batch, reach))

    def _replay(self, batch: _Batch, shape: tuple[str, int], run: Callable[[], Tensor]) -> Tensor:
        """The logits of ``run``: captured when it comes for the second time over what it is over, then replayed."""
        key = *shape, self._over
        if key not in batch.graphs:
            # Kernels are compiled and libraries set up at their first use, which must not be captured.
            first = len(batch.lengths), key
            if first not in self._warm:
                self._warm.add(first)
                return run()
            self._capture(batch, key, run)
        graph, logits_BV = batch.graphs[key]
        graph.replay()
        return logits_BV

    def _capture(self, batch: _Batch, key: Any, run: Callable[[], Tensor]) -> None:
        if batch.pool is None:
            batch.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Whatever other threads do on the card meanwhile is not of this capture.
        with torch.cuda.graph(graph, pool=batch.pool, capture_error_mode="thread_local"):
            logits_BV = run()
        batch.graphs[key] = graph, logits_BV


def _empty(model: JebiForCausalLM, rows: int) -> _Batch:
    """Buffers without room for any token."""
    cache = StaticCache(model.model.shape, rows, model.dtype, model.device)
    ids_B, lengths_B = torch.zeros(2, rows, dtype=torch.long, device=model.device)
    return _Batch(cache, ids_B, lengths_B)


def _within_share(model: JebiForCausalLM, tokens: int, rows: int) -> int:
    """So many tokens a row, or as many as so many rows' caches have within what is kept; at least the first step."""
    cache = _empty(model, rows).cache
    while captures(model) and tokens > STEP and cache.bytes_for(slots_for(tokens)) > _share_of(model.device):
        tokens = slots_for(tokens) // 2
    return tokens


def _refresh(model: JebiForCausalLM) -> None:
    """Cast the adapters as they are now."""
    with torch.inference_mode(False):
        for group in model.model.answering_groups():
            group.refresh()


@torch.no_grad()
def _aside(device: torch.device, run: Callable[[], object]) -> None:
    """Compile what ``run`` launches, in a thread of its own, which knows nothing of other threads' card and modes."""
    from jebi.kernels.gpu.launch import compiling

    with torch.cuda.device(device if device.type == "cuda" else -1), compiling():
        run()


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
