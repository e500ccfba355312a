"""``training.graphs``: a pass padded to its shape has the pass's loss and gradients. Captures need a card."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.data.heldout import inputs_of
from jebi.data.passes import Pass, collate, cut
from jebi.models.hf import JebiForCausalLM
from jebi.training import graphs
from jebi.training.flat import FlatGradients
from jebi.training.graphs import PassGraph, PassGraphs, padded

CPU = torch.device("cpu")
SHARED = list(range(10, 40))


def row(number: int, length: int, start: list[int], learnt_from: int = 0) -> dict[str, list[int]]:
    drawn = torch.randint(3, 300, (length - len(start),), generator=torch.Generator().manual_seed(number)).tolist()
    ids = start + drawn
    labels = [-100] * learnt_from + ids[learnt_from:]
    return {"input_ids": ids, "labels": labels, "row": [number], "lengths": [length]}


PASSES = {
    "rows of one length": [row(0, 40, []), row(1, 40, []), row(2, 40, [])],
    "rows of many lengths": [row(0, 40, []), row(1, 5, []), row(2, 97, []), row(3, 1, [])],
    "answers alone": [row(0, 60, [], 50), row(1, 70, [], 65)],
    "shared beginnings": [row(0, 40, SHARED), row(1, 50, SHARED), row(2, 33, SHARED[:20]), row(3, 12, [])],
    "one row": [row(0, 90, [])],
}


@pytest.fixture
def model(tiny_llama: Callable[..., Path], load: Callable[..., JebiForCausalLM]) -> Callable[[], JebiForCausalLM]:
    def make() -> JebiForCausalLM:
        model = load(tiny_llama("untied"))
        attach(model, LoraConfig(r=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in adapter_tensors(model).values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        model.model.stack(keep=True)
        return model.train()

    return make


def run(model: JebiForCausalLM, inputs: dict) -> dict[str, Tensor]:
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: tensor.grad for name, tensor in adapter_tensors(model).items()}


def only(name: str) -> Pass:
    (part,) = cut([collate(PASSES[name])], 4096)
    return part


@pytest.mark.parametrize("name", PASSES)
def test_a_padded_pass_is_the_pass(name: str, model: Callable[[], JebiForCausalLM]) -> None:
    part = only(name)
    graph = PassGraph(padded(part).shape, CPU)
    # A second fill, after another pass: nothing of that may be left.
    if name != "rows of one length":
        graph.fill(padded(only(name)), 1)
    graph.fill(padded(part), 17)
    ours = run(model(), graph.inputs())
    plain = run(model(), inputs_of(part, CPU) | {"num_items_in_batch": 17})
    assert (part.rows.whole_T is not None) == (name == "shared beginnings")
    for key, value in plain.items():
        # Sums over more rows of zeros are blocked otherwise: roundings of float32, grown over two layers.
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


def test_passes_of_like_sizes_have_one_shape() -> None:
    """So that few are captured; what differs in kind has another."""
    shapes = {name: padded(only(name)).shape for name in PASSES}
    others = [row(0, 31, []), row(1, 88, []), row(2, 7, [])]
    (part,) = cut([collate(others)], 4096)
    assert padded(part).shape == shapes["rows of many lengths"]
    assert len({shapes["rows of many lengths"], shapes["shared beginnings"], shapes["one row"]}) == 3
    assert shapes["rows of one length"].alike
    assert shapes["shared beginnings"].whole is not None


def test_shapes_hold_every_pass_of_their_kind() -> None:
    """Many random passes: rows, tokens and learnt tokens fit, and the last start is the end."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(1, 30, (1,), generator=generator))
        lengths = torch.randint(1, 700, (count,), generator=generator).tolist()
        starts = [SHARED[: min(length - 1, 30)] if n % 2 else [] for n, length in enumerate(lengths)]
        rows = [row(n, length, start) for n, (length, start) in enumerate(zip(lengths, starts))]
        for part in cut([collate(rows)], 4096):
            whole = padded(part)
            shape, graph = whole.shape, PassGraph(whole.shape, CPU)
            graph.fill(whole, 1)
            inputs = graph.inputs()
            if inputs["rows"].cu is not None:
                ends = inputs["rows"].cu.tolist()
                assert ends == sorted(ends)
                assert ends[-1] == (shape.whole or shape.tokens)
                assert max(b - a for a, b in pairwise(ends)) <= inputs["rows"].longest


def test_what_hinders_a_capture_is_named(model: Callable[[], JebiForCausalLM], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "16 bits" in str(PassGraphs.hindrance(model()))
    monkeypatch.setattr(graphs, "varlen_serves", lambda *_: True)
    apart, stacked = model(), model()
    apart.model.unstack()
    assert "map by map" in str(PassGraphs.hindrance(apart))
    assert PassGraphs.hindrance(stacked) is None
    stacked.model.norm.weight.requires_grad_()
    stacked.model.norm.weight.data = stacked.model.norm.weight.data.bfloat16()
    assert PassGraphs.hindrance(stacked) == "trained weights are not float32"


def test_a_larger_pass_pins_host_memory_before_it_is_captured(
    model: Callable[[], JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was captured goes first, since both may not fit; smaller passes find enough pinned."""
    captured: list[tuple[int, object]] = []
    pools = iter(range(100))

    def capture(self: PassGraph, run: Callable[[], Tensor], pool: object) -> None:
        captured.append((self.shape.tokens, pool))
        self.replay = run  # type: ignore[method-assign]

    monkeypatch.setattr(PassGraph, "capture", capture)
    monkeypatch.setattr(PassGraphs, "_cast", lambda self: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ours = model()
    ours.model.checkpointing = "offload"
    gradients = FlatGradients([p for p in ours.parameters() if p.requires_grad])
    passes = PassGraphs(ours, lambda loss: loss.backward(), {}, gradients)

    def runs(rows: int) -> None:
        (part,) = cut([collate([row(n, 40, []) for n in range(rows)])], 4096)
        passes.run(padded(part), 1)

    for rows in (2, 2, 1, 1, 3, 3, 2, 1):
        runs(rows)
    assert captured == [(80, 0), (40, 0), (120, 1), (80, 1), (40, 1)]


def test_adapters_are_cast_before_any_pass_lies_about_them(
    model: Callable[[], JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ours = model()
    passes = PassGraphs(
        ours, lambda loss: loss.backward(), {}, FlatGradients([p for p in ours.parameters() if p.requires_grad])
    )
    groups = [group for layer in ours.model.decoder_layers() if layer.stacked for group in layer.stacked.stacked()]
    casts = [group.casts() for group in groups]
    assert casts
    for group, cast in zip(groups, casts):
        assert cast is not None
        adapters = [linear.adapter for linear in group.maps if linear.adapter is not None]
        assert torch.equal(cast[0], torch.cat([lora.A_rK for lora in adapters]).to(cast[0].dtype))
    passes.run(padded(*cut([collate([row(0, 40, [])])], 4096)), 1)
    assert [group.casts() for group in groups] == casts, "where they were"
