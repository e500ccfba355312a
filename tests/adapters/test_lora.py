"""``adapters.lora``: where adapters go, how they start, and what is trained."""

import pytest
import torch

from jebi.adapters.lora import attach, detach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import TARGET_MODULES, LoraConfig
from jebi.errors import AdapterError, ConfigError

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(load, folder, **settings):
    model = load(folder)
    attach(model, LoraConfig(**settings))
    return model


def test_a_fresh_adapter_changes_nothing(tiny_llama, load) -> None:
    model = adapted(load, tiny_llama())
    assert torch.equal(model(IDS).logits, load(tiny_llama())(IDS).logits)


def test_random_state_decides_the_start(tiny_llama, load) -> None:
    torch.manual_seed(1)
    one = adapter_tensors(adapted(load, tiny_llama(), random_state=5))
    torch.manual_seed(2)
    two = adapter_tensors(adapted(load, tiny_llama(), random_state=5))
    other = adapter_tensors(adapted(load, tiny_llama(), random_state=6))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
        assert name.endswith("lora_B.weight") or not torch.equal(tensor, other[name])


def test_a_seeds_numbers_are_drawn_for_maps_of_one_name_together(tiny_llama, load) -> None:
    """An adapter that a seed started once is started by it again: the order of drawing is part of the setting."""
    generator = torch.Generator().manual_seed(5)
    model = adapted(load, tiny_llama(), random_state=5, target_modules=["up_proj", "q_proj"])
    for kind in ("self_attn.q_proj", "mlp.up_proj"):
        for layer in model.model.layers:
            drawn = torch.empty(16, 64).uniform_(-1 / 8, 1 / 8, generator=generator)
            assert torch.equal(layer.get_submodule(kind).lora.A_rK, drawn)


def test_attaching_leaves_the_global_generator_alone(tiny_llama, load) -> None:
    before = torch.get_rng_state()
    adapted(load, tiny_llama())
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_and_dtypes(tiny_llama, load) -> None:
    model = load(tiny_llama(), torch.bfloat16)
    attach(model, LoraConfig(r=5))
    tensors = adapter_tensors(model)
    assert len(tensors) == 2 * 7 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    down = "base_model.model.model.layers.1.mlp.down_proj"
    assert tensors[f"{down}.lora_A.weight"].shape == (5, 176)
    assert tensors[f"{down}.lora_B.weight"].shape == (64, 5)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(tensor) for tensor in tensors.values()}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 16, "lora_alpha": 16}, 1.0),
        ({"r": 16, "lora_alpha": 8}, 0.5),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
        ({"r": 64, "lora_alpha": 1.5}, 1.5 / 64),
    ],
)
def test_scale(tiny_llama, load, settings: dict[str, object], scale: float) -> None:
    model = adapted(load, tiny_llama(), **settings)
    assert {linear.lora.scale for _, linear in model.linears() if linear.lora is not None} == {scale}


def test_chosen_targets(tiny_llama, load) -> None:
    model = adapted(load, tiny_llama(), target_modules=["v_proj", "down_proj"])
    adapted_maps = {path for path, linear in model.linears() if linear.lora is not None}
    assert adapted_maps == {f"model.layers.{i}.{end}" for i in (0, 1) for end in ("self_attn.v_proj", "mlp.down_proj")}


def test_the_order_of_targets_does_not_matter(tiny_llama, load) -> None:
    one = adapter_tensors(adapted(load, tiny_llama(), target_modules=["q_proj", "down_proj"]))
    two = adapter_tensors(adapted(load, tiny_llama(), target_modules=["down_proj", "q_proj"]))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["query", "lm_head", "embed_tokens", "all-linear"])
def test_an_unknown_target_lists_what_there_is(tiny_llama, load, name: str) -> None:
    model = load(tiny_llama())
    with pytest.raises(
        ConfigError, match=f"target_modules: the model has no '{name}'. It has: q_proj, k_proj,.* down_proj"
    ):
        attach(model, LoraConfig(target_modules=["q_proj", name]))
    assert model.adapter is None
    assert all(linear.lora is None for _, linear in model.linears())


def test_a_second_adapter_is_refused(tiny_llama, load) -> None:
    model = adapted(load, tiny_llama())
    with pytest.raises(AdapterError, match="already has an adapter; load the base model again"):
        attach(model, LoraConfig())


@pytest.mark.parametrize(
    ("bias", "targets", "trained"),
    [
        ("none", TARGET_MODULES, 0),
        ("all", TARGET_MODULES, 14),
        ("all", ("q_proj",), 14),
        ("lora_only", TARGET_MODULES, 14),
        ("lora_only", ("q_proj", "up_proj"), 4),
    ],
)
def test_which_biases_are_trained(tiny_llama, load, bias: str, targets: tuple[str, ...], trained: int) -> None:
    model = load(tiny_llama("biased"), torch.bfloat16)
    before = model(IDS).logits
    attach(model, LoraConfig(bias=bias, target_modules=list(targets)))
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad]
    assert len(biases) == trained
    assert all(p.dtype == torch.float32 for p in biases)
    assert torch.equal(model(IDS).logits, before)


def test_biases_of_a_model_without_any(tiny_llama, load) -> None:
    model = adapted(load, tiny_llama(), bias="all")
    assert len(adapter_tensors(model)) == 28


def test_training_mode_is_handed_on(tiny_llama, load) -> None:
    for training in (True, False):
        model = load(tiny_llama()).train(training)
        attach(model, LoraConfig(lora_dropout=0.1))
        assert all(linear.lora.training == training for _, linear in model.linears() if linear.lora is not None)


def test_the_adapter_switched_off_is_the_base_model_biases_included(tiny_llama, load) -> None:
    base = load(tiny_llama("biased"))(IDS).logits
    model = adapted(load, tiny_llama("biased"), bias="all")
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1)
    tuned = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, tuned)
    assert not torch.equal(tuned, base)


def test_detach_gives_the_base_model_back(tiny_llama, load) -> None:
    base = load(tiny_llama("biased"))
    model = adapted(load, tiny_llama("biased"), bias="lora_only")
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1)
    detach(model)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    attach(model, LoraConfig())


def test_padding_in_front_of_a_row_predicts_nothing(tiny_llama, load) -> None:
    model = load(tiny_llama())
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    alone = model(IDS[1:, 4:], labels=IDS[1:, 4:]).loss
    padded = model(IDS[1:], attention_mask=mask[1:], labels=IDS[1:].masked_fill(mask[1:] == 0, -100)).loss
    # The same tokens through the same products; only the order of the sums may differ.
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)
