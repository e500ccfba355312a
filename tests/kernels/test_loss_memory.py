"""The losses take what `plan.activations.loss_bytes` and `plan.inventory` count, on a CPU."""

import dataclasses

import pytest
import torch
from tests.alive import Peak
from torch import Tensor

from jebi.config import LoraConfig, Places, limits
from jebi.kernels import sliced_cross_entropy as sliced
from jebi.kernels.linear_cross_entropy import LossForm, linear_cross_entropy
from jebi.models.families import DecoderShape
from jebi.nn import slices
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan import inventory
from jebi.plan.activations import loss_bytes
from jebi.plan.held import Held
from jebi.plan.inventory import fixed_items, total
from jebi.quant.int8 import Int8Weight

TOKENS, WIDTH, VOCABULARY, CHUNK = 512, 64, 4096, 64
SHAPE = DecoderShape((LayerShape(WIDTH, 4, 2, 16, 96, 1e-5, AttentionForm(0.25)),), VOCABULARY, tied=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (limits, sliced, inventory):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * CHUNK)
    for module in (slices, inventory):
        monkeypatch.setattr(module, "SLICE_BYTES", VOCABULARY * WIDTH)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype)
    return torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_(), weight, torch.randint(VOCABULARY, (TOKENS,))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_head(dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight, labels = inputs(dtype)
    with Peak() as peak:
        linear_cross_entropy(hidden, weight, labels, LossForm(softcap=softcap)).backward()
    shape = dataclasses.replace(SHAPE, logit_softcap=softcap)
    counted = loss_bytes(shape, dtype.itemsize, TOKENS, on_card=False)
    assert 0.8 * counted <= peak.most + hidden.nbytes <= 1.05 * counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_head(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(dtype)
    head = slices.WeightSlices(Int8Weight.quantize(weight), dtype)
    with Peak() as peak:
        sliced.sliced_cross_entropy(hidden, head, labels, LossForm()).backward()
    held = Held(SHAPE, "nf4", dtype.itemsize, Places("card", "int8"), LoraConfig(), on_card=False)
    counted = loss_bytes(SHAPE, dtype.itemsize, TOKENS, on_card=False) + total(fixed_items(held))
    assert 0.4 * counted <= peak.most + hidden.nbytes <= counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head(dtype: torch.dtype) -> None:
    """Its master is float32; the gradient that outlives the loss is among what is counted as gradients."""
    hidden, weight, labels = inputs(dtype)
    master = weight.float().requires_grad_()
    with Peak() as peak:
        linear_cross_entropy(hidden, master, labels, LossForm()).backward()
    lora = LoraConfig(modules_to_save=["lm_head"])
    held = Held(SHAPE, "nf4", dtype.itemsize, Places("card", "card"), lora, on_card=False)
    counted = loss_bytes(SHAPE, dtype.itemsize, TOKENS, on_card=False) + total(fixed_items(held))
    assert 0.8 * counted <= peak.most + hidden.nbytes <= 1.05 * counted
