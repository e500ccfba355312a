"""``models.compute``: where ``compute="fp8"`` is refused, and a small model trained with it stays near bfloat16's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import Compute, LoraConfig, ModelConfig
from jebi.errors import ConfigError
from jebi.fast import FastLanguageModel
from jebi.kernels import scaled_product
from jebi.models import compute
from jebi.models.hf import JebiForCausalLM

CPU = torch.device("cpu")
IDS = torch.randint(3, 300, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_llama: Callable[..., Path], load: Callable[..., JebiForCausalLM]) -> Callable[..., JebiForCausalLM]:
    def make(four: bool = True, dtype: torch.dtype = torch.bfloat16, **lora: object) -> JebiForCausalLM:
        made = load(tiny_llama("untied"), dtype, load_in_4bit=four)
        attach(made, LoraConfig(r=4, **lora))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in adapter_tensors(made).values():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        return made.train()

    return make


def run(model: JebiForCausalLM) -> dict[str, Tensor]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: tensor.grad for name, tensor in adapter_tensors(model).items()}


@pytest.mark.parametrize(("four", "keep"), [(True, True), (True, False), (False, False)])
def test_loss_and_gradients_stay_near_those_of_bfloat16(
    model: Callable[..., JebiForCausalLM], four: bool, keep: bool
) -> None:
    """As near as those of weights that are off by what 8 bits cost, drawn at random, with everything else exact.

    A product of numbers in 8 bits is off by sqrt(2/3) / 16 of itself (tests/kernels/test_scaled_product.py).
    """
    exact, noisy, plain, ours = (model(four, dtype) for dtype in (torch.float32,) * 2 + (torch.bfloat16,) * 2)
    generator = torch.Generator().manual_seed(3)
    for layer in noisy.model.decoder_layers():
        for _, linear in layer.projections():
            weight = linear.dense()
            off = torch.randn(weight.shape, generator=generator) * (2 / 3) ** 0.5 / 16
            linear.store(nn.Parameter(weight * (1 + off), requires_grad=False))
    plain.model.stack(keep)
    ours.model.stack(keep, "fp8")
    fine, near, usual, eight = (run(made) for made in (exact, noisy, plain, ours))
    for name, value in eight.items():
        assert not torch.equal(value, usual[name]), name
        if name != "loss":
            # Twice, since there are products forward and backward, with errors of their own.
            assert (value - fine[name]).norm() <= 2 * (near[name] - fine[name]).norm(), name
    # What a whole training is held to (benchmarks/fp8_curve.py).
    assert (eight["loss"] - usual["loss"]).abs() <= 0.005 * usual["loss"]


@pytest.mark.parametrize("compute", ["fp8", "fp8_backward"])
def test_kept_copies_change_no_bit(model: Callable[..., JebiForCausalLM], compute: Compute) -> None:
    results = []
    for keep in (True, False):
        made = model()
        made.model.stack(keep, compute)
        results.append(run(made))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("four", [True, False])
def test_the_backward_alone_leaves_the_loss_to_the_bit(model: Callable[..., JebiForCausalLM], four: bool) -> None:
    """Gradients are off, and nearer than those of both passes in 8 bits."""
    usual, both, ours = model(four), model(four), model(four)
    usual.model.stack(True)
    both.model.stack(True, "fp8")
    ours.model.stack(True, "fp8_backward")
    exact, far, near = (run(made) for made in (usual, both, ours))
    assert torch.equal(near.pop("loss"), exact["loss"])
    off = {name: (near[name] - exact[name]).norm() for name in near}
    assert any(off.values())
    assert all(value < (far[name] - exact[name]).norm() for name, value in off.items())


def test_evaluation_multiplies_as_training_does(model: Callable[..., JebiForCausalLM]) -> None:
    made = model()
    made.model.stack(True, "fp8")
    trained = made(input_ids=IDS, labels=IDS).loss.detach()
    with torch.no_grad():
        assert torch.equal(made.eval()(input_ids=IDS, labels=IDS).loss, trained)
    made.model.unstack()
    with torch.no_grad():
        assert not torch.equal(made(input_ids=IDS, labels=IDS).loss, trained)


def test_full_finetuning_has_no_frozen_base() -> None:
    with pytest.raises(ConfigError, match="compute 'fp8' multiplies a frozen base, and full_finetuning leaves none"):
        ModelConfig(full_finetuning=True, load_in_4bit=False, compute="fp8")
    with pytest.raises(ConfigError, match="compute must be one of auto, fp8, fp8_backward, not 'fp4'"):
        ModelConfig(compute="fp4")


def test_a_cpu_is_refused_before_anything_is_loaded() -> None:
    message = r"compute 'fp8' \(model.compute in a config file\) needs a CUDA card of compute capability 9.0 or newer"
    with pytest.raises(ConfigError, match=f"{message}, and this is the CPU: drop compute"):
        FastLanguageModel.from_pretrained("/nowhere", device="cpu", compute="fp8")


def test_older_cards_and_other_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some card")
    with pytest.raises(ConfigError, match=r"this is Some card with 8\.9: drop compute"):
        compute.require_card("fp8", card, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    compute.require_card("fp8", card, torch.bfloat16)
    with pytest.raises(ConfigError, match="goes with dtype bfloat16, not float16: drop dtype or compute"):
        compute.require_card("fp8", card, torch.float16)


def test_adapters_that_cannot_be_laid_together_are_refused(model: Callable[..., JebiForCausalLM]) -> None:
    compute.require_layers("fp8", model().model)
    for settings in ({"use_dora": True}, {"lora_dropout": 0.1}, {"lora_dropout": 0.1, "layers_to_transform": [1]}):
        layer = 1 if "layers_to_transform" in settings else 0
        with pytest.raises(ConfigError, match=rf"layer {layer} has DoRA, adapter dropout or trained weights: set use_"):
            compute.require_layers("fp8", model(**settings).model)


def test_sizes_that_a_card_does_not_take_are_refused(
    model: Callable[..., JebiForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_product, "UNIT", 128)
    with pytest.raises(ConfigError, match=r"needs sizes that 128 divides, and self_attn.q_proj of layer 0 has 64"):
        compute.require_layers("fp8", model().model)


def test_a_fresh_adapter_is_looked_at_at_once(tiny_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_folder), 128, torch.bfloat16, device="cpu")
    assert model.compute == "auto"
    model.compute = "fp8"
    with pytest.raises(ConfigError, match="set use_dora false and lora_dropout 0, or drop compute"):
        FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.1)
