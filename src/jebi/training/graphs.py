"""Training passes captured as CUDA graphs: the host says "again" once a pass instead of launching thousands of kernels.

A pass is padded to one of a few shapes. The first pass of a shape is captured, forward and backward, with its inputs in
buffers that stay where they are; every further one fills the buffers and replays. Gradients lie in one flat buffer, so
that a replay finds them where it left them. What is computed is the model's own code, so results are those of a pass
that is not captured.

Padding stands behind the last row, as a row of its own from which nothing is learnt.

Shapes: U held tokens, T tokens of whole rows, N learnt tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jebi.data.passes import Pass
from jebi.models.hf import JebiForCausalLM
from jebi.models.unpadding import Learnt, learnt_of
from jebi.nn.attention import varlen_serves
from jebi.nn.host_weight import HostWeight
from jebi.nn.rows import Rows
from jebi.training.flat import FlatGradients


@dataclass(frozen=True)
class Shape:
    """What passes of one graph have in common."""

    tokens: int
    """U, padding included."""
    learnt: int
    """N, padding included."""
    starts: tuple[int, ...]
    """Starts of rows of equal length; else as many rows of as many tokens as there may be."""
    whole: int | None
    """T where beginnings are shared, padding included."""
    alike: bool
    """Whether the rows are of one length and fill the tokens, so that no padding is needed."""


@dataclass(frozen=True)
class Padded:
    """A pass as a graph's buffers take it, on the host."""

    shape: Shape
    tokens: int
    """Of the whole rows, without padding."""
    values: dict[str, Tensor]
    """By the buffers' names."""


class PassGraphs:
    """Runs training passes of one model by replaying their graphs."""

    def __init__(
        self,
        model: JebiForCausalLM,
        backward: Callable[[Tensor], None],
        settings: dict[str, Any],
        gradients: FlatGradients,
    ):
        """Nothing is captured yet.

        Args:
            model: on a card, set up for training.
            backward: takes a pass's loss and fills the gradients.
            settings: further keywords for the model.
            gradients: of all that is trained.
        """
        self._model, self._backward, self._settings, self._gradients = model, backward, settings, gradients
        self._captured: dict[Shape, PassGraph] = {}
        self._casts: torch.cuda.CUDAGraph | None = None
        self._pool = torch.cuda.graph_pool_handle()
        self._warm: set[tuple[bool, bool]] = set()
        self._pinned = 0
        """Tokens of the largest pass that host memory is pinned for."""
        self._version = -1
        # Now, and not by the first pass, among whose activations they would lie for good.
        model.model.cast_adapters(again=False)
        model.model.cast_adapters(again=True)

    @staticmethod
    def hindrance(model: JebiForCausalLM) -> str | None:
        """Why its passes cannot be captured, or None where they can.

        Embedding and head may be in host memory that the card reaches by itself.
        """
        layers = list(model.model.decoder_layers())
        hosts = [module for module in model.modules() if isinstance(module, HostWeight)]
        reasons = {
            "rows of any lengths in one call ask for 16 bits and compute capability 8.0": not varlen_serves(
                model.device, model.dtype
            ),
            "DoRA, dropout and trained weights run map by map": any(layer.stacked is None for layer in layers),
            "trained weights are not float32": any(
                p.dtype != torch.float32 for p in model.parameters() if p.requires_grad
            ),
            "RoPE follows each row's length": any(r.reach is not None for r in model.model.rotary.values()),
            "attention scores are capped": any(s.attention.softcap is not None for s in model.model.shape.layers),
            "layers that several processes share come and go": model.model.sharded,
            "host memory could not be page-locked": any(not module.locked for module in hosts),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def run(self, part: Padded, items: Tensor | float) -> Tensor:
        """Forward and backward of a pass; its loss, which the next pass writes over."""
        self._begin()
        shape = part.shape
        graph = self._captured.get(shape) or PassGraph(shape, self._model.device)
        graph.fill(part, items)
        if shape not in self._captured:
            kind = (shape.alike, shape.whole is None)
            if self._must_pin(shape) or kind not in self._warm:
                # Kernels are compiled, libraries set up and the loss scale made at their first use, which must not be
                # captured. Later the scale changes in place, so that replays read it as it is.
                self._warm.add(kind)
                loss = self._pass(graph)
                # What outlives the step, the optimizer's moments first of all, would lie in what the pass has left,
                # which could not be given back then: 3.3 GiB of 19.7 where rows had 16,384 tokens.
                torch.cuda.empty_cache()
                return loss
            self._captured[shape] = graph
            graph.capture(lambda: self._pass(graph), self._pool)
        return graph.replay()

    def _must_pin(self, shape: Shape) -> bool:
        """Whether a pass asks for more host memory than is pinned, which cannot happen while it is captured.

        Memory is scarce then: what graphs hold and a pass beside them may not fit, so that they are captured anew.
        """
        if self._model.model.checkpointing != "offload" or shape.tokens <= self._pinned:
            return False
        self._pinned = shape.tokens
        if self._captured:
            self._captured.clear()
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
        return True

    def _begin(self) -> None:
        """See to it that gradients lie where the graphs expect them, and that what is trained is cast as it is now."""
        self._gradients.begin()
        version = sum(p._version for p in self._gradients.parameters)
        if version != self._version:
            self._version = version
            self._cast()

    def _cast(self) -> None:
        """Cast the adapters for the step, in one replay instead of two launches a matrix."""
        if not self._warm:
            return
        # First, since it also sees to it that the adapters of now have their places.
        self._model.model.cast_adapters(again=False)
        if self._casts is None:
            self._casts = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._casts, capture_error_mode="thread_local"):
                self._model.model.cast_adapters(again=True)
        self._casts.replay()

    def _pass(self, graph: "PassGraph") -> Tensor:
        loss = self._model(**graph.inputs(), **self._settings).loss
        assert isinstance(loss, Tensor)
        self._backward(loss)
        return loss.detach()


class PassGraph:
    """Input buffers of one shape, and the captured pass."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape = shape

        def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._buffers = {
            "ids": zeros(1, shape.tokens),
            "positions": zeros(shape.tokens),
            "index": zeros(shape.learnt),
            "labels": zeros(shape.learnt),
            "counts": zeros(shape.learnt, dtype=torch.float32),
            "items": zeros(dtype=torch.float32),
        }
        if not shape.alike:
            self._buffers["cu"] = zeros(len(shape.starts), dtype=torch.int32)
        if shape.whole is not None:
            self._buffers |= {"whole": zeros(shape.whole), "first": zeros(shape.tokens)}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = zeros(dtype=torch.float32)

    def inputs(self) -> dict[str, Any]:
        """The model's keywords, made of the buffers."""
        b = self._buffers
        rows = Rows(self.shape.starts, b["positions"], b.get("whole"), b.get("first"), b.get("cu"))
        learnt = Learnt(b["index"], b["labels"], b["counts"])
        return {"input_ids": b["ids"], "rows": rows, "learnt": learnt, "num_items_in_batch": b["items"]}

    def fill(self, part: Padded, items: Tensor | float) -> None:
        """Put a pass into the buffers."""
        for name, value in part.values.items():
            self._buffers[name].copy_(value, non_blocking=True)
        # Of a number on the host the value travels with the launch; a copy would wait for the card.
        self._buffers["items"].fill_(items)

    def capture(self, run: Callable[[], Tensor], pool: Any) -> None:
        """Record what ``run`` launches."""
        self._graph = torch.cuda.CUDAGraph()
        # This thread's calls alone are watched: over several processes NCCL's threads ask for their events meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._loss.copy_(run())

    def replay(self) -> Tensor:
        """Run it; the loss."""
        assert self._graph is not None
        self._graph.replay()
        return self._loss


def padded(part: Pass, pinned: bool = False) -> Padded:
    """A pass padded to its shape, in ``pinned`` memory where the card is to fetch it by itself."""
    rows, learnt = part.rows, learnt_of(part.shift_labels, part.counts)
    assert learnt.counts_N is not None
    shape = _shape_of(part, learnt.index_N.shape[0])
    spare, missing = shape.tokens - rows.positions_U.shape[0], shape.learnt - learnt.index_N.shape[0]
    values = {
        "ids": F.pad(part.input_ids, (0, spare)),
        "positions": torch.cat([rows.positions_U, torch.arange(spare)]),
        "index": F.pad(learnt.index_N, (0, missing)),
        # Some token, which does not count.
        "labels": F.pad(learnt.labels_N, (0, missing)),
        "counts": F.pad(learnt.counts_N, (0, missing)),
    }
    if not shape.alike:
        values["cu"] = _padded_starts(shape, rows)
    if shape.whole is not None:
        assert rows.whole_T is not None
        assert rows.first_U is not None
        # Spare held tokens stand in a row of their own, and what room is left in the whole rows repeats the last.
        spares = torch.arange(shape.tokens - spare, shape.tokens)
        filled = torch.cat([rows.whole_T, spares])
        values["whole"] = F.pad(filled, (0, shape.whole - filled.shape[0]), value=shape.tokens - 1)
        values["first"] = torch.cat([rows.first_U, torch.arange(part.tokens, part.tokens + spare)])
    if pinned:
        values = {name: value.pin_memory() for name, value in values.items()}
    return Padded(shape, part.tokens, values)


def _padded_starts(shape: Shape, rows: Rows) -> Tensor:
    """The starts, a row for the spare tokens, one for what is left in the whole rows, and empty rows."""
    total = shape.tokens if shape.whole is None else shape.whole
    starts = [*rows.starts]
    # Spare tokens in rows no longer than the longest that the shape allows.
    longest = shape.starts[1]
    while starts[-1] < total:
        starts.append(min(total, starts[-1] + longest))
    return torch.tensor(starts + [total] * (len(shape.starts) - len(starts)), dtype=torch.int32)


def _shape_of(part: Pass, learnt: int) -> Shape:
    """The shape that a pass with so many learnt tokens is padded to."""
    rows, tokens = part.rows, part.input_ids.shape[1]
    if rows.alike and rows.whole_T is None:
        return Shape(tokens, _learnt_room(learnt, tokens), rows.starts, None, True)
    held = _round(tokens)
    longest = max(_LONGEST, 1 << (rows.longest - 1).bit_length())
    whole = None if rows.whole_T is None else _round(part.tokens + held - tokens)
    # Room for the rows and for spare tokens in rows no longer than the longest.
    most = len(rows.starts) + 2 * _STEP_MOST // longest + 2
    count = max(16, 1 << (most - 1).bit_length())
    return Shape(held, _learnt_room(learnt, held), tuple(longest * n for n in range(count + 1)), whole, False)


def _learnt_room(learnt: int, tokens: int) -> int:
    """Room for the learnt tokens: all tokens where most are learnt, so that there are not two sizes to a shape."""
    room = _round(learnt)
    return tokens if room > tokens // 2 else room


_STEP, _STEP_MOST = 256, 1024
_LONGEST = 1024
"""Shapes do not tell rows below this apart: attention's empty blocks cost less than a capture."""


def _round(tokens: int) -> int:
    """Up to a multiple of 256, or of an eighth where that is more: few shapes, little padding."""
    step = min(_STEP_MOST, max(_STEP, 1 << max(0, tokens.bit_length() - 4)))
    return max(step, -(-tokens // step) * step)
