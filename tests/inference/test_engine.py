"""The engine's logits are those of whole rows, whatever stands beside a row and however long it gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jebi.inference import engine as engine_module
from jebi.inference.decoding import Decoding
from jebi.inference.engine import Engine
from jebi.inference.generation import _answer_once
from jebi.inference.kv_cache import STEP
from jebi.models.hf import JebiForCausalLM

BAR = 1e-5
"""Of the largest logit: the same float32 products, blocked otherwise, over two layers."""


def ids(length: int) -> Tensor:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(length))


def padded(rows: list[Tensor]) -> Tensor:
    longest = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])


def assert_last_logits(model: JebiForCausalLM, logits_BV: Tensor, rows: list[Tensor]) -> None:
    for mine, row in zip(logits_BV, rows, strict=True):
        whole = model(row[None]).logits[0, -1]
        assert (mine - whole).abs().max() <= BAR * whole.abs().max()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("lengths", [(7,), (7, 7), (3, 11, 1), (STEP - 2, 5)])
@torch.no_grad()
def test_prompts_and_steps(tiny_llama: Callable[[str], Path], load, lengths: tuple[int, ...], stacked: bool) -> None:
    """The last lengths cross a step of the cache's size."""
    model = load(tiny_llama("llama3")).eval()
    if stacked:
        model.model.stack(keep=True, answering=True)
    engine, rows = Engine(), [ids(length) for length in lengths]
    assert_last_logits(model, engine.prefill(model, padded(rows), [*lengths], max(lengths) + 5), rows)
    for new in torch.randint(3, 300, (5, len(rows)), generator=torch.Generator().manual_seed(0)):
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, new)]
        assert_last_logits(model, engine.step(model, padded(rows)), rows)
    engine.release(model)
    assert not engine._batches  # nothing is kept where nothing is captured


@torch.no_grad()
def test_a_step_with_room_to_spare_is_the_step_that_is_captured(tiny_llama: Callable[[str], Path], load) -> None:
    model = load(tiny_llama("tied")).eval()
    rows = [ids(9), ids(4)]
    engines = Engine(), Engine()
    for engine in engines:
        engine.prefill(model, padded(rows), [9, 4], 16)
    exact = engines[0].step(model, padded([torch.cat((row, row[:1])) for row in rows]))
    batch = engines[1]._batches[2]
    batch.ids_B.copy_(torch.stack([row[0] for row in rows]))
    spare = engines[1]._forward(model, batch, STEP)
    assert (spare - exact).abs().max() <= BAR * exact.abs().max()
    assert batch.lengths_B.tolist() == [10, 5]


@torch.no_grad()
def test_buffers_made_under_inference_mode_serve_outside_it(tiny_llama: Callable[[str], Path], load) -> None:
    model = load(tiny_llama("tied")).eval()
    model.model.stack(keep=True, answering=True)
    engine, row = Engine(), ids(5)
    with torch.inference_mode():
        engine.prefill(model, row[None], [5], 9)
    row = torch.cat((row, row[:1]))
    assert_last_logits(model, engine.step(model, row[None]), [row])


@torch.no_grad()
def test_buffers_that_move_take_their_graphs_and_their_pool_along(tiny_llama: Callable[[str], Path], load) -> None:
    model, engine = load(tiny_llama("tied")).eval(), Engine()
    engine.prefill(model, ids(5)[None], [5], 9)
    batch = engine._batches[1]
    batch.graphs[0], batch.pool = (None, torch.empty(0)), (1, 0)
    batch.reserve(STEP)
    assert batch.pool
    batch.reserve(STEP + 1)
    assert not batch.graphs
    assert batch.pool is None


@torch.no_grad()
def test_warming_up_leaves_nothing_behind_on_a_cpu(tiny_llama: Callable[[str], Path], load) -> None:
    model, engine = load(tiny_llama("tied")).eval(), Engine()
    engine.warm_up(model, 64)
    assert not engine._batches


class Rerun:
    """What is captured on a card, by the calls that a replay repeats."""

    def __init__(self, run: Callable[[], Tensor]):
        self._run, self.logits = run, run()

    def replay(self) -> None:
        self.logits.copy_(self._run())


@pytest.mark.parametrize("tokens_kept", [64, 512, 10**6])
@torch.no_grad()
def test_what_was_made_ready_stays_so(tiny_llama: Callable[[str], Path], load, monkeypatch, tokens_kept: int) -> None:
    """More numbers of rows than are kept unasked, and more room than there is: fewer tokens, but all are ready."""
    model, engine, rows = load(tiny_llama("tied")).eval(), Engine(), (1, 2, 3, 5, 8)
    model.model.stack(keep=True, answering=True)
    model.decoding = Decoding(engine)
    captured = []

    def capture(self: Engine, batch: Any, key: Any, run: Callable[[], Tensor]) -> None:
        captured.append(key)
        batch.graphs[key] = (rerun := Rerun(run)), rerun.logits

    a_token = engine_module._empty(model, 1).cache.bytes_for(1)
    monkeypatch.setattr(engine_module, "captures", lambda _: True)
    monkeypatch.setattr(engine_module, "_share_of", lambda _: max(tokens_kept, STEP) * sum(rows) * a_token)
    monkeypatch.setattr(Engine, "_capture", capture)
    engine.warm_up(model, 1000, rows)
    assert {count: batch.cache.slots for count, batch in engine._batches.items()} == dict.fromkeys(
        rows, max(STEP, min(tokens_kept, 1024))
    )
    ready = len(captured)
    _answer_once(model, rows)
    assert len(captured) == ready


@torch.no_grad()
def test_an_answer_of_nan_is_not_in_the_next_one(tiny_llama: Callable[[str], Path], load, monkeypatch) -> None:
    """Where buffers are kept, as on a card; slots that a shorter row hides still meet a probability of zero."""
    model, rows = load(tiny_llama("tied")).eval(), [ids(9), ids(4)]
    model.model.stack(keep=True, answering=True)
    engine, weight = Engine(), model.model.layers[0].self_attn.v_proj.weight
    whole = weight.clone()
    weight.fill_(torch.nan)
    assert engine.prefill(model, padded([ids(20)] * 2), [20, 20], 24).isnan().all()
    with monkeypatch.context() as kept:
        kept.setattr(engine_module, "captures", lambda _: True)
        kept.setattr(engine_module, "_share_of", lambda _: 2**40)
        engine.release(model)
    assert engine._batches
    weight.copy_(whole)
    assert_last_logits(model, engine.prefill(model, padded(rows), [9, 4], 16), rows)
    rows = [torch.cat((row, row[:1])) for row in rows]
    assert_last_logits(model, engine.step(model, padded(rows)), rows)
