"""Cached passes of the tiny model: in whatever chunks tokens come, padded or not, logits are those of the whole row.

The growing cache holds what transformers' own holds, whatever `generate` does to it.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache

from jebi.errors import ModelError
from jebi.models.cache import STEP, GrowingCache, GrowingLayer

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def close(ours: Tensor, whole: Tensor) -> None:
    """Of the largest logit: the same float32 products, blocked otherwise, over two layers."""
    assert (ours - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("make", [DynamicCache, GrowingCache])
@pytest.mark.parametrize("variant", ["tied", "llama3"])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [1, 11]])
@torch.no_grad()
def test_chunks_equal_the_whole(tiny_llama, load, chunks: list[int], variant: str, make: Callable[[], Cache]) -> None:
    model = load(tiny_llama(variant))
    cache, parts, start = make(), [], 0
    for size in chunks:
        parts.append(model(IDS[:, start : start + size], past_key_values=cache).logits)
        start += size
    close(torch.cat(parts, dim=1), model(IDS).logits)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("chunks", [[12], [6, 1, 5], [7, 1, 1, 1, 1, 1]])
@torch.no_grad()
def test_left_padded_chunks_equal_each_row_alone(tiny_llama, load, chunks: list[int]) -> None:
    model = load(tiny_llama())
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    cache, parts, start = GrowingCache(), [], 0
    for size in chunks:
        end = start + size
        parts.append(model(IDS[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        start = end
    logits = torch.cat(parts, dim=1)
    assert logits.isfinite().all()
    close(logits[0], model(IDS[:1]).logits[0])
    close(logits[1, 5:], model(IDS[1:, 5:]).logits[0])


@torch.no_grad()
def test_a_cache_is_made_when_asked_for(tiny_llama, load) -> None:
    model = load(tiny_llama())
    assert model(IDS).past_key_values is None
    assert model(IDS, use_cache=True).past_key_values.get_seq_length() == 12


def states(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values of new tokens."""
    keys, values = torch.randn(2, batch, 3, tokens, 4, generator=torch.Generator().manual_seed(tokens))
    return keys, values


@pytest.mark.parametrize(
    "between",
    [
        lambda cache: None,
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
    ],
    ids=["append", "crop", "swap", "beam", "select", "reset"],
)
def test_growing_cache_holds_what_the_dynamic_one_holds(between: Callable[[Cache], object]) -> None:
    ours, theirs = GrowingCache(), DynamicCache()
    for size in (5, 1, 1, STEP, 3):
        for layer in (0, 1):
            mine, other = (cache.update(*states(size), layer) for cache in (ours, theirs))
            assert torch.equal(mine[0], other[0])
            assert torch.equal(mine[1], other[1])
        between(ours)
        between(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_appending_a_token_copies_nothing() -> None:
    cache = GrowingCache()
    keys, _ = cache.update(*states(5), 0)
    for _ in range(STEP - 5):
        longer, _ = cache.update(*states(1), 0)
        assert longer.data_ptr() == keys.data_ptr()
    longer, _ = cache.update(*states(1), 0)
    assert longer.data_ptr() != keys.data_ptr()
    assert longer.shape[2] == STEP + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_ways_of_generating(tiny_llama, load, settings: dict[str, object]) -> None:
    made = []
    for model in (load(tiny_llama()), AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)):
        torch.manual_seed(0)
        made.append(
            model.generate(IDS, max_new_tokens=9, pad_token_id=0, attention_mask=torch.ones_like(IDS), **settings)
        )
    assert torch.equal(*made)


def test_guessing_from_the_prompt(tiny_llama, load) -> None:
    """Prompt look-up crops the cache after every wrong guess."""
    ids = IDS[:1].repeat(1, 3)
    made = []
    for model in (load(tiny_llama()), AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)):
        made.append(model.generate(ids, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=4, pad_token_id=0))
    assert torch.equal(*made)


def test_generate_is_given_the_growing_cache(tiny_llama, load) -> None:
    settings = {"max_new_tokens": 3, "pad_token_id": 0, "return_dict_in_generate": True}
    made = load(tiny_llama()).generate(IDS, **settings)
    assert all(isinstance(layer, GrowingLayer) for layer in made.past_key_values.layers)
    given = DynamicCache()
    assert load(tiny_llama()).generate(IDS, past_key_values=given, **settings).past_key_values is given


def test_a_static_cache_is_refused(tiny_llama, load) -> None:
    with pytest.raises(ModelError, match="a static cache is not available: leave cache_implementation None"):
        load(tiny_llama()).generate(IDS, max_new_tokens=2, pad_token_id=0, cache_implementation="static")
