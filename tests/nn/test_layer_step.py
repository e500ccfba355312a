"""A token at a time over a static cache gives what whole rows give, whatever else stands in batch or buffers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebi.models.hf import JebiForCausalLM
from jebi.nn.layer_node import run_without_graph
from jebi.nn.layer_step import Now, plain_step
from jebi.nn.rows import rows_from_lengths

CPU = torch.device("cpu")
LENGTHS = [9, 4, 6]
BAR = 1e-5
"""Of the largest value: the same float32 products, blocked otherwise."""


@pytest.mark.parametrize("chunk", [5, 64])
@torch.no_grad()
def test_whole_rows_without_a_graph(tiny_llama: Callable[[str], Path], load, chunk: int) -> None:
    """Against the plain layer; keys and values are handed out as attention reads them."""
    model: JebiForCausalLM = load(tiny_llama("biased"))
    layer = next(model.model.decoder_layers())
    rows = rows_from_lengths(LENGTHS, CPU)
    hidden_TD = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(0))
    tables = model.model.rotary["full_attention"].of_rows(rows, torch.float32)
    taken = []

    def take(k, v):
        taken.append((k.clone(), v.clone()))

    out_TD = run_without_graph(layer, hidden_TD, tables, rows, chunk, take)
    expected = []

    def attend(q, k, v):
        expected.append((k, v))
        return torch.cat([whole(q[s:e], k[s:e], v[s:e]) for s, e in rows.spans()])

    def whole(q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1)

    near(out_TD, layer(hidden_TD, tables, attend))
    for ours, plain in zip(taken[0], expected[0], strict=True):
        near(ours, plain)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("spare", [0, 7])
@torch.no_grad()
def test_steps_equal_whole_rows(tiny_llama: Callable[[str], Path], load, spare: int, window: int | None) -> None:
    from dataclasses import replace

    model: JebiForCausalLM = load(tiny_llama("tied"))
    layer = next(model.model.decoder_layers())
    layer.shape = replace(layer.shape, attention=replace(layer.shape.attention, window=window))
    rotary = model.model.rotary["full_attention"]
    rows = rows_from_lengths(LENGTHS, CPU)
    hidden_TD = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(0))
    whole_TD = run_without_graph(layer, hidden_TD, rotary.of_rows(rows, torch.float32), rows, 64, lambda *_: None)
    parts, wholes = hidden_TD.split(LENGTHS), whole_TD.split(LENGTHS)
    longest = max(LENGTHS)
    keys = torch.zeros(len(LENGTHS), 2, longest + spare, 16)
    values = torch.zeros_like(keys)
    for place in range(longest):
        # A row that has ended goes on with its last token, as rows do that wait for others.
        hidden_BD = torch.stack([part[min(place, len(part) - 1)] for part in parts])
        lengths_B = torch.full((len(LENGTHS),), place)
        now = Now(lengths_B, place + 1 + spare, even=not spare)
        cos, sin = rotary.of_positions(lengths_B[:, None], torch.float32)
        out_BD = plain_step(layer, hidden_BD, (cos[:, 0], sin[:, 0]), keys, values, now)
        for row, whole in enumerate(wholes):
            if place < len(whole):
                near(out_BD[row], whole[place])


def test_masks_hide_what_a_row_does_not_have() -> None:
    now = Now(torch.tensor([0, 3]), 6)
    assert now.mask(None)[:, 0].tolist() == [[True] + [False] * 5, [True] * 4 + [False] * 2]
    assert now.mask(2)[:, 0].tolist() == [[True] + [False] * 5, [False, False, True, True, False, False]]
    assert now.mask(6) is now.mask(None)
    even = Now(torch.tensor([3, 3]), 4, even=True)
    assert even.mask(None) is None
    assert even.mask(4) is None
    assert even.mask(2)[0, 0].tolist() == [False, False, True, True]


def near(ours: torch.Tensor, other: torch.Tensor) -> None:
    assert (ours - other).abs().max() <= BAR * other.abs().max()


def test_what_a_steps_kernels_take_is_made_once() -> None:
    now = Now(torch.tensor([4, 0, 7]), 9)
    assert torch.equal(now.ends_B, torch.tensor([5, 1, 8], dtype=torch.int32))
    assert torch.equal(now.rows_B, torch.arange(3))
    for groups in (1, 8):
        counts = now.counts(groups)
        assert torch.equal(counts, torch.zeros(3 * groups, dtype=torch.int32))
        assert now.counts(groups) is counts
    assert now.ends_B is now.ends_B
