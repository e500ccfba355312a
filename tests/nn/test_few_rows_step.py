"""A step in few launches against `plain_step`, by the kernels' references; families are `compatibility`'s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TINY
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.kernels import few_rows, nf4_on_cpu
from jebi.models.hf import JebiForCausalLM
from jebi.nn import few_rows_step
from jebi.nn.layer_step import Now, plain_step

BAR = 1e-5
"""Of the largest value: the same float32 products, blocked otherwise."""

Made = Callable[..., JebiForCausalLM]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain_step` is the reference here, in float32: no kernel that rounds, whatever the CPU has."""
    monkeypatch.setattr(nf4_on_cpu, "available", lambda: False)


@pytest.fixture
def made(tiny_llama: Callable[[str], Path], load) -> Made:
    """A model that answers, its layers laid for few rows."""

    def made(variant: str, rank: int, **storage: bool) -> JebiForCausalLM:
        model = load(tiny_llama(variant), **storage).eval()
        if rank:
            attach(model, LoraConfig(r=rank))
            with torch.no_grad():
                for tensor in adapter_tensors(model).values():
                    tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(tensor.numel()))
        model.model.stack(keep=False, answering=True)
        model.model.lay_for_few_rows()
        for group in model.model.answering_groups():
            group.refresh()
        return model

    return made


def both(model: JebiForCausalLM, rows: int, scale: float = 1.0) -> list[list[torch.Tensor]]:
    """Output, keys and values of each way, for rows that have 5, 4, 3, ... tokens."""
    layer = next(model.model.decoder_layers())
    layer.scale = scale
    shape, draw = layer.shape, torch.Generator().manual_seed(0)
    hidden_BD = torch.randn(rows, shape.width, generator=draw)
    cache = torch.randn(2, rows, shape.kv_heads, 9, shape.head_dim, generator=draw)
    lengths_B = 5 - torch.arange(rows) % 5
    cos, sin = model.model.rotary["full_attention"].of_positions(lengths_B[:, None], torch.float32)
    results = []
    for step in (few_rows_step.few_rows_step, plain_step):
        keys, values = cache.clone()
        out = step(layer, hidden_BD, (cos[:, 0], sin[:, 0]), keys, values, Now(lengths_B, 7))
        results.append([out, keys, values])
    return results


@pytest.mark.parametrize(
    ("variant", "storage"),
    [("even", {"load_in_4bit": True}), ("even", {"load_in_8bit": True}), ("tied", {}), ("biased", {})],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_step_is_the_plain_step(made: Made, variant: str, rank: int, rows: int, storage: dict[str, bool]) -> None:
    model = made(variant, rank, **storage)
    assert next(model.model.decoder_layers()).few_rows is not None
    for scale in (1.0, 2.0**-5):
        for ours, plain in zip(*both(model, rows, scale), strict=True):
            assert (ours - plain).abs().max() <= BAR * plain.abs().max()


@torch.no_grad()
def test_norms_behind_the_blocks_come_at_the_streams_scale(tmp_path: Path, load) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Gemma2Config(**TINY)).save_pretrained(tmp_path)
    model = load(tmp_path).eval()
    model.model.stack(keep=False, answering=True)
    model.model.lay_for_few_rows()
    for ours, plain in zip(*both(model, 2, 2.0**-5), strict=True):
        assert (ours - plain).abs().max() <= BAR * plain.abs().max()


@torch.no_grad()
def test_more_rows_than_few_take_the_plain_step(made: Made) -> None:
    for ours, plain in zip(*both(made("tied", 0), 17), strict=True):
        assert torch.equal(ours, plain)


@torch.no_grad()
def test_products_by_themselves_are_those_of_a_step(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for what shapes and presence of arguments say."""
    model, seen, product = made("biased", 4), [], few_rows.product

    def watched(x: Any, weight: Any, bias: Any, thin: Any, *others: Any) -> torch.Tensor:
        arguments = x, weight, bias, *(thin.left_TR, thin.right_RF), *others
        seen.append([(one.shape, one.dtype) if torch.is_tensor(one) else one for one in arguments])
        return product(x, weight, bias, thin, *others)

    monkeypatch.setattr(few_rows, "product", watched)
    both(model, 3)
    of_step = seen[1:]
    seen.clear()
    layer = next(model.model.decoder_layers())
    for run in few_rows_step.products(layer, 3):
        run()
    assert seen == of_step[::-1]
    assert few_rows_step.products(layer, 17) == []
    model.model.unstack()
    assert few_rows_step.products(layer, 3) == []


@torch.no_grad()
def test_weights_of_a_form_that_no_kernel_reads_are_left(tiny_llama: Callable[[str], Path], load) -> None:
    model = load(tiny_llama("tied"))
    layer = next(model.model.decoder_layers())
    few_rows_step.lay(layer)
    assert layer.few_rows is None  # it is not laid to answer
    odd = torch.randn(*layer.mlp.down_proj.weight.shape).t().contiguous().t()
    layer.mlp.down_proj.store(nn.Parameter(odd, requires_grad=False))
    model.model.stack(keep=False, answering=True)
    few_rows_step.lay(layer)
    assert layer.few_rows is None
    model.model.unstack()


@pytest.mark.parametrize("storage", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
@torch.no_grad()
def test_the_model_stays_what_it_was(tiny_llama: Callable[[str], Path], load, tmp_path: Path, storage) -> None:
    """Its own weights are parts of the laid ones: saved, trained on and laid again they are the same."""
    model = load(tiny_llama("even"), **storage).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    logits = model(ids).logits
    for _ in range(2):
        model.model.stack(keep=False, answering=True)
        model.model.lay_for_few_rows()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        model.model.unstack()
    assert torch.equal(model(ids).logits, logits)
    if "load_in_8bit" not in storage:  # which are never written
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved", **storage)(ids).logits, logits)
