"""Padded prompts are flat ones: the same logits, the same cache, and the same steps behind them."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tests.conftest import TINY
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.inference import engine as engine_module
from jebi.inference.engine import Engine
from jebi.inference.kv_cache import STEP, StaticCache, slots_for
from jebi.inference.prefill import FEWEST, MOST, PaddedPrompts, flat_prompts, pads, sizes
from jebi.kernels.gpu.launch import launch
from jebi.models.decoder import Decoder
from jebi.models.hf import JebiForCausalLM

BAR = 1e-5
"""Of the largest number: the same float32 products, blocked otherwise, over two layers."""
WINDOW = {"sliding_window": 5}


def near(mine: Tensor, exact: Tensor) -> bool:
    return bool((mine - exact).abs().max() <= BAR * exact.abs().max())


def prompts(lengths: tuple[int, ...]) -> Tensor:
    """Rows padded on the left, with tokens that would count if they were seen."""
    return torch.randint(3, 300, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))


def stacked(model: JebiForCausalLM) -> JebiForCausalLM:
    model.eval().model.stack(keep=True, answering=True)
    return model


@pytest.fixture
def windowed(tmp_path: Path, load) -> JebiForCausalLM:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**TINY | WINDOW)).save_pretrained(tmp_path)
    return stacked(load(tmp_path))


@pytest.fixture
def adapted(tiny_llama: Callable[[str], Path], load) -> JebiForCausalLM:
    model = load(tiny_llama("biased"))
    attach(model, LoraConfig(r=4))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(tensor.numel()))
    return stacked(model)


@pytest.fixture
def as_on_card(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Captures on a CPU: the run comes again, into the same logits. Returns the keys of what was captured."""
    captured: list[Any] = []

    class Again:
        def __init__(self, run: Callable[[], Tensor]):
            with torch.inference_mode(False):
                self.run, self.logits_BV = run, torch.empty(0)

        def replay(self) -> None:
            made_BV = self.run()
            self.logits_BV.resize_(made_BV.shape).copy_(made_BV)

    def capture(engine: Engine, batch: Any, key: Any, run: Callable[[], Tensor]) -> None:
        captured.append(key)
        graph = Again(run)
        batch.graphs[key] = graph, graph.logits_BV

    monkeypatch.setattr(engine_module, "captures", lambda _: True)
    monkeypatch.setattr(engine_module, "_share_of", lambda _: 2**40)
    monkeypatch.setattr(Engine, "_capture", capture)
    return captured


def assert_alike(model: JebiForCausalLM, lengths: tuple[int, ...], size: int) -> None:
    ids_BS, shape = prompts(lengths), model.model.shape
    flat, padded = (StaticCache(shape, len(lengths), model.dtype, model.device) for _ in range(2))
    for cache in (flat, padded):
        cache.reserve(max(lengths) + 1)
    expected_BV = flat_prompts(model, flat, ids_BS, [*lengths])
    passes = PaddedPrompts(model, len(lengths), size)
    passes.fill(torch.full((len(lengths), size), 7), [size] * len(lengths))  # nothing of it is left
    passes.fill(ids_BS, [*lengths])
    assert near(passes.forward(model, padded, torch.tensor(lengths)), expected_BV)
    for mine, exact in ((padded.keys_NBGLd, flat.keys_NBGLd), (padded.values_NBGLd, flat.values_NBGLd)):
        for row, length in enumerate(lengths):
            assert near(mine[:, row, :, :length], exact[:, row, :, :length])
        # Padding stays within its size.
        assert not mine[:, :, :, size:].any()


CASES = [((7,), 32), ((32,), 32), ((7, 7), 32), ((3, 11, 1), 64), ((100, 40), 128)]


@pytest.mark.parametrize(("lengths", "size"), CASES)
@pytest.mark.parametrize("on", [True, False])
@torch.no_grad()
def test_padded_is_flat(adapted: JebiForCausalLM, lengths: tuple[int, ...], size: int, on: bool) -> None:
    if on:
        assert_alike(adapted, lengths, size)
        return
    with adapted.disable_adapter():
        assert_alike(adapted, lengths, size)


@pytest.mark.parametrize(("lengths", "size"), CASES)
@torch.no_grad()
def test_padded_is_flat_in_windows(windowed: JebiForCausalLM, lengths: tuple[int, ...], size: int) -> None:
    assert pads(windowed)
    assert_alike(windowed, lengths, size)


@torch.no_grad()
def test_capped_scores_go_flat(tmp_path: Path, load, as_on_card: list[Any]) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Gemma2Config(**TINY | WINDOW)).save_pretrained(tmp_path)
    model, engine = stacked(load(tmp_path)), Engine()
    assert not pads(model)
    engine.warm_up(model, 64)
    assert {key[0] for key in as_on_card} == {"step"}


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 64, 2 * MOST])
def test_sizes_fit_into_any_cache_that_the_prompts_fit_into(rows: int) -> None:
    found = sizes(rows)
    assert found == sorted(set(found))
    assert all(FEWEST <= rows * size <= MOST for size in found)
    for longest in range(1, max(found, default=0) + 1):
        assert next(size for size in found if size >= longest) <= slots_for(longest + 1)


@torch.no_grad()
def test_nothing_is_captured_behind_the_warm_up(adapted: JebiForCausalLM, as_on_card: list[Any]) -> None:
    """Prompts of the numbers of rows it was asked for, with the adapter that was on; others go flat."""
    engine, reference = Engine(), Engine()
    engine.warm_up(adapted, 300, (1, 4))
    assert sorted(key[:2] for key in as_on_card) == sorted(
        [("prompts", 128), ("prompts", 256), ("prompts", 512)]
        + [("prompts", 32), ("prompts", 64), ("prompts", 128), ("prompts", 256)]
        + [("step", STEP), ("step", 2 * STEP)] * 2
    )
    count = len(as_on_card)
    for lengths in ((5,), (128,), (129,), (299,), (5, 30, 7, 32), (250, 31, 7, 120), (299, 3, 2, 1), (4, 9)):
        ids_BS = prompts(lengths)
        for each in (engine, reference):
            each.prefill(adapted, ids_BS, [*lengths], 300)
        assert engine._batch is not None
        assert bool(engine._batch.padded) == (len(lengths) in (1, 4))
        first, other = (each.prefill(adapted, ids_BS, [*lengths], 300) for each in (engine, reference))
        assert near(first, other)
        ids_BS = torch.cat((ids_BS, ids_BS[:, :1]), 1)
        assert near(engine.step(adapted, ids_BS), reference.step(adapted, ids_BS))
        if len(lengths) in (1, 4):
            assert [key for key in as_on_card[count:] if key[0] == "prompts"] == []
        for each in (engine, reference):
            each.release(adapted)


def compiles_alone() -> bool:
    """Whether kernels are only compiled here."""
    kernel = MagicMock()
    launch(kernel, (1,))
    return bool(kernel.warmup.called)


@torch.no_grad()
def test_steps_are_compiled_beside_prompts_and_before_anything_is_captured(
    adapted: JebiForCausalLM, as_on_card: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    aside, forward_step, done, steps = engine_module._aside, Decoder.forward_step, [], []

    def watched(device: torch.device, run: Callable[[], object]) -> None:
        aside(device, run)
        done.append((threading.current_thread() is threading.main_thread(), len(as_on_card)))

    def step(decoder: Decoder, hidden: Tensor, keys: Tensor, *others: Any) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            own = all(keys is not kept.cache.keys_NBGLd for kept in engine._batches.values())
            steps.append((len(hidden), own, torch.is_grad_enabled(), compiles_alone()))
        return forward_step(decoder, hidden, keys, *others)

    monkeypatch.setattr(engine_module, "_aside", watched)
    monkeypatch.setattr(Decoder, "forward_step", step)
    adapted.model.lay_for_few_rows()
    engine = Engine()
    for _ in range(2):  # for the second time over caches that have gone
        engine.warm_up(adapted, 100, (1, 4, 1, 17))
        engine._batches.clear()
    once = [(False, 0)] * 2 * (1 + 3)
    assert done[: len(once)] == once, "a step and three products for 1 and for 4 rows"
    assert len(done) == 2 * len(once)
    assert {captured for _, captured in done[len(once) :]} == {done[-1][1]}
    assert sorted(steps) == [(1, True, False, True)] * 2 + [(4, True, False, True)] * 2
    assert not compiles_alone()
    for layer in adapted.model.decoder_layers():
        layer.few_rows = None
    engine.warm_up(adapted, 100)
    assert len(done) == 2 * len(once), "other steps write where prompts do"


@torch.no_grad()
def test_what_does_not_compile_aside_is_told_and_nothing_more_begins(
    adapted: JebiForCausalLM, as_on_card: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def failing(device: torch.device, run: Callable[[], object]) -> None:
        begun.append(run)
        time.sleep(0.1)
        raise RuntimeError("does not compile")

    monkeypatch.setattr(engine_module, "_aside", failing)
    adapted.model.lay_for_few_rows()
    with pytest.raises(RuntimeError, match="does not compile"):
        Engine().warm_up(adapted, 100)
    assert begun
    begun.clear()
    monkeypatch.setattr(Engine, "_warm_prompts", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Engine().warm_up(adapted, 100, range(1, 17))
    assert len(begun) < 64, "of 16 numbers of rows, four parts each"


@torch.no_grad()
def test_prompts_are_captured_anew_over_another_adapter_and_another_cache(
    adapted: JebiForCausalLM, as_on_card: list[Any]
) -> None:
    engine, ids_BS = Engine(), prompts((9,))
    engine.warm_up(adapted, 100)

    def captured(most: int) -> int:
        before = len(as_on_card)
        for _ in range(3):
            engine.prefill(adapted, ids_BS, [9], most)
            engine.release(adapted)
        return len(as_on_card) - before

    assert captured(100) == 0
    with adapted.disable_adapter():
        assert captured(100) == 1
        assert captured(100) == 0
    assert captured(100) == 0
    assert captured(STEP + 1) == 1  # the cache has moved


@torch.no_grad()
def test_buffers_made_under_inference_mode_serve_outside_it(adapted: JebiForCausalLM, as_on_card: list[Any]) -> None:
    with torch.inference_mode():
        engine = Engine()
        engine.warm_up(adapted, 64)
    ids_BS = prompts((9,))
    assert near(engine.prefill(adapted, ids_BS, [9], 64), Engine().prefill(adapted, ids_BS, [9], 64))


@torch.no_grad()
def test_caches_that_are_not_kept_have_no_captured_prompts(
    adapted: JebiForCausalLM, as_on_card: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_share_of", lambda _: 0)
    engine = Engine()
    engine.warm_up(adapted, 64)
    for _ in range(3):
        engine.prefill(adapted, prompts((9,)), [9], 64)
        engine.release(adapted)
    assert {key[0] for key in as_on_card} <= {"step"}
