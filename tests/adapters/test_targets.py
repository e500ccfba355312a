"""``adapters.targets``: the projections that PEFT would adapt; what fits nothing is named."""

from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from jebi.adapters.lora import attach
from jebi.config import TARGET_MODULES, LoraConfig
from jebi.errors import ConfigError


def adapted(model) -> dict[str, int]:
    """Ranks of the adapted projections by path."""
    return {path: linear.lora.A_rK.shape[0] for path, linear in model.linears() if linear.lora is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.self_attn\.[qk]_proj"},
        {"target_modules": r"model\.layers\.1\..*_proj"},
        {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"exclude_modules": r".*\.0\..*"},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": []},
        {"modules_to_save": ["1.self_attn.q_proj"]},
        {"rank_pattern": {"q_proj": 2, r"1\..*": 5, "k_proj": 9}},
    ],
    ids=str,
)
def test_the_same_modules_as_peft(tiny_llama, load, settings: dict[str, Any]) -> None:
    settings = {"target_modules": list(TARGET_MODULES), "r": 3} | settings
    base = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): parameter.shape[0]
        for name, parameter in theirs.named_parameters()
        if ".lora_A." in name
    }
    model = load(tiny_llama())
    attach(model, LoraConfig(**settings))
    assert adapted(model) == expected


def test_all_linear_may_be_narrowed_to_layers(tiny_llama, load) -> None:
    model = load(tiny_llama())
    attach(model, LoraConfig(target_modules="all-linear", layers_to_transform=[1]))
    assert len(adapted(model)) == 7
    assert all(".1." in path for path in adapted(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "query"]}, "target_modules: the model has no 'query'. It has: q_proj, k_proj,"),
        ({"target_modules": ["qkv_proj"]}, "target_modules: the model has no 'qkv_proj'"),
        ({"target_modules": "q_proj"}, r"expression of whole paths, and none fits; such as 'model.layers.0.self_attn"),
        ({"target_modules": ".*"}, "also means lm_head, which takes no adapter: name it in modules_to_save"),
        ({"exclude_modules": r".*"}, "no projection is left to adapt"),
        ({"layers_to_transform": 2}, "layers_to_transform: the model has no layer 2; its 2 count from 0"),
        ({"layers_to_transform": [0, -1]}, "layers_to_transform: the model has no layer -1"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "no projection is left to adapt"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern: 'query' is the end of no adapted projection's path"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern: 'lm_head' is the end of no"),
        ({"modules_to_save": ["embedding"]}, "modules_to_save: the model has no 'embedding'; embed_tokens and lm_head"),
        ({"modules_to_save": ["self_attn"]}, r"modules_to_save: 'model.layers.0.self_attn' has no weight"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_fits_nothing_is_named(tiny_llama, load, settings: dict[str, Any], message: str) -> None:
    model = load(tiny_llama())
    with pytest.raises(ConfigError, match=message):
        attach(model, LoraConfig(**settings))
    assert model.adapter is None
    assert not adapted(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_four_bit_projections_are_not_trained_wholly(tiny_llama, load) -> None:
    model = load(tiny_llama(), load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.up_proj' has no weight .* load_in_4bit=False"):
        attach(model, LoraConfig(modules_to_save=["0.mlp.up_proj"]))


def test_fused_maps_stand_for_their_parts(load, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "pad_token_id": 0}
    Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(tmp_path)
    model = load(tmp_path)
    attach(model, LoraConfig(exclude_modules=["o_proj"]))
    ends = {path.rpartition(".")[2] for path in adapted(model)}
    assert ends == {"qkv_proj", "gate_up_proj", "down_proj"}
    assert model.adapter.config.target_modules == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    (record,) = [r for r in caplog.records if "holds some of these maps as one" in r.message]
    assert "so qkv_proj, gate_up_proj are adapted" in record.message
