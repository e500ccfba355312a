"""``jebi.fast``: the tutorial's verbs load, adapt and switch a model, and refuse what they cannot honour."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from jebi import FastLanguageModel
from jebi.adapters.peft_config import CONFIG_FILE
from jebi.adapters.peft_files import adapter_tensors
from jebi.errors import AdapterError, ConfigError, ModelError
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(3, 300, (1, 300), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **settings):
    return FastLanguageModel.from_pretrained(
        str(folder), **{"max_seq_length": 128, "dtype": torch.float32, "device": "cpu"} | settings
    )


def test_load_adapt_save_and_load_again(tiny_llama, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama("worded"))
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, NF4Weight)
    assert model.max_seq_length == 128
    assert tokenizer.padding_side == "left"
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert again.adapter is not None
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, NF4Weight),
        ({"load_in_4bit": True}, NF4Weight),
        ({"load_in_4bit": False}, torch.nn.Parameter),
        ({"load_in_8bit": True}, Int8Weight),
        ({"load_in_8bit": True, "load_in_4bit": False}, Int8Weight),
        ({"load_in_8bit": False}, NF4Weight),
    ],
    ids=str,
)
def test_how_projections_are_held(tiny_llama, settings: dict[str, bool], kind: type) -> None:
    model, _ = load(tiny_llama("worded"), **settings)
    held = {type(linear.weight) for name, linear in model.linears() if name != "lm_head"}
    assert held == {kind}
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)


@torch.no_grad()
def test_8_bits_answer_nearly_as_16(tiny_llama) -> None:
    exact, eight, four = (
        load(tiny_llama("worded"), **settings)[0](IDS).logits
        for settings in ({"load_in_4bit": False}, {"load_in_8bit": True}, {})
    )
    # Their weights' errors are a 16th of those of 4 bits; logits follow in proportion.
    assert (eight - exact).std() < (four - exact).std() / 8
    assert not torch.equal(eight, exact)


def test_both_4_and_8_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit exclude each other: drop one"):
        FastLanguageModel.from_pretrained("/nowhere", load_in_4bit=True, load_in_8bit=True)


def test_an_adapter_that_does_not_name_its_base(tiny_llama, tmp_path: Path) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match=f"adapter '{tmp_path}' does not name its base model; load that first"):
        load(tmp_path)


def test_settings_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="max_seq_length must be at least 1, not 0"):
        FastLanguageModel.from_pretrained("/nowhere", max_seq_length=0)
    with pytest.raises(ModelError, match="'/nowhere' is no folder"):
        FastLanguageModel.from_pretrained("/nowhere")


@torch.no_grad()
def test_rows_longer_than_the_models_stretch_rope_and_say_so(tiny_llama, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="jebi"):
        model, _ = load(tiny_llama("worded"), max_seq_length=320, load_in_4bit=False)
    assert caplog.messages == ["max_seq_length 320 exceeds the model's 128: RoPE scaled linearly by 2.5"]
    assert model.config.max_position_embeddings == model.max_seq_length == 320
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama("worded"),
        dtype=torch.float32,
        max_position_embeddings=320,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    )
    ours, expected = model(LONG).logits, theirs(LONG).logits
    # Of the largest logit, float32's roundings over two layers; without the stretch it is off by more than a tenth.
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_a_model_saved_with_another_rope_means_the_same_to_transformers(tiny_llama, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0}
    model, _ = load(tiny_llama("worded"), max_seq_length=320, load_in_4bit=False, rope_scaling=scaling)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.max_position_embeddings == 320
    ours, expected = model(LONG).logits, theirs(LONG).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()  # as above


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0, not 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be from 0 to below 1"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["W_pack"]}, "the model has no 'W_pack'"),
        ({"loftq_config": {"loftq_bits": 8}}, "loftq_bits must be 4, not 8"),
        ({"use_dorra": True}, "setting 'use_dorra' is unknown. Did you mean 'use_dora'"),
        ({"r": True}, "r must be int, not True"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be float, not '0.1'"),
        ({"use_rslora": "yes"}, "use_rslora must be bool, not 'yes'"),
        ({"random_state": None}, "random_state must be int, not None"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be list.* or null, not 'lm_head'"),
        ({"use_gradient_checkpointing": "often"}, "must be True, False, 'unsloth' or 'auto', not 'often'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_adapters_are_refused_and_leave_the_model_as_it_was(tiny_llama, settings, message: str) -> None:
    model, _ = load(tiny_llama("worded"))
    with pytest.raises(ConfigError, match=message):
        FastLanguageModel.get_peft_model(model, **settings)
    assert model.adapter is None
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "kept", "auto"),
    [("auto", "none", True), (False, "none", False), (True, "recompute", False), ("unsloth", "offload", False)],
)
def test_what_layers_keep(tiny_llama, asked: bool | str, kept: str, auto: bool) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=asked)
    assert (model.model.checkpointing, model.auto_checkpointing) == (kept, auto)
    assert model.is_gradient_checkpointing == (kept != "none")


def test_checkpointing_through_transformers_names(tiny_llama) -> None:
    model, _ = load(tiny_llama("worded"))
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        enable, disable = (getattr(model, f"{name}_{verb}") for verb in ("enable", "disable"))
        enable(**{f"{name}_kwargs": {"use_reentrant": False}})
        assert model.model.checkpointing == "recompute"
        assert getattr(model, f"is_{name}")
        disable()
        assert model.model.checkpointing == "none"
        assert not getattr(model, f"is_{name}")
        enable(offload=True)
        assert model.model.checkpointing == "offload"
        enable()
        assert model.model.checkpointing == "offload"
        disable()
        with pytest.raises(ModelError, match=r"every_n_layers is not available.* Leave it 1"):
            enable(every_n_layers=2)


@torch.no_grad()
def test_inference_and_training_modes(tiny_llama) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model, lora_dropout=0.2)
    before = model.eval()(IDS).logits
    linear = model.model.layers[0].mlp.up_proj
    assert FastLanguageModel.for_inference(model) is model
    assert not model.training
    assert linear.dense() is linear.dense()
    # Kept copies hold the very values that are dequantised otherwise, and a fresh adapter adds nothing.
    assert torch.equal(model(IDS).logits, before)
    assert FastLanguageModel.for_training(model) is model
    assert model.training
    assert linear.dense() is not linear.dense()


@torch.no_grad()
def test_an_adapter_put_on_a_model_that_answers_already(tiny_llama, tmp_path: Path) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model)
    for tensor in adapter_tensors(model).values():
        tensor.add_(0.1)
    model.save_pretrained(tmp_path)
    other, _ = load(tiny_llama("worded"))
    FastLanguageModel.for_inference(other)
    FastLanguageModel.put_adapter(other, tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(AdapterError, match="already has an adapter"):
        FastLanguageModel.put_adapter(other, tmp_path)


def test_counts_in_pefts_words(tiny_llama, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    model.print_trainable_parameters()
    trained, everything = model.trainable_parameters()
    assert trained == 2 * 2 * (64 + 64)
    expected = (
        f"trainable params: {trained:,} || all params: {everything:,} || trainable%: {100 * trained / everything:.4f}\n"
    )
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "text",
    [
        "lora: {use_dora: true, layers_to_transform: [1], exclude_modules: [k_proj]}",
        "lora: {init_lora_weights: pissa, rank_pattern: {q_proj: 2}, alpha_pattern: {v_proj: 8}}",
        "lora: {loftq_config: {loftq_iter: 2}, target_modules: all-linear}",
        r"lora: {target_modules: '.*\.mlp\..*', modules_to_save: [lm_head]}",
        "model: {full_finetuning: true}",
    ],
)
def test_what_yaml_says_reaches_the_model(tiny_llama, tmp_path: Path, text: str) -> None:
    from dataclasses import asdict

    from jebi.config import read_run

    (tmp_path / "run.yaml").write_text(text + "\ndata: {train: rows.jsonl}\n", encoding="utf-8")
    run = read_run(tmp_path / "run.yaml")
    model, _ = load(tiny_llama("worded"), full_finetuning=run.model.full_finetuning)
    if run.model.full_finetuning:
        assert model.adapter is None
        assert all(parameter.requires_grad for parameter in model.parameters())
        return
    FastLanguageModel.get_peft_model(model, **asdict(run.lora))
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.adapter.config == model.adapter.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": None}, "max_seq_length must be int, not None"),
        ({"load_in_4bit": "yes"}, "load_in_4bit must be bool or null, not 'yes'"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "'linear' contradicts .*'yarn'"),
    ],
    ids=str,
)
def test_impossible_ways_to_load_are_refused(tiny_llama, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_llama("worded"), **settings)


def test_layers_may_be_a_range(tiny_llama, tmp_path: Path) -> None:
    model, _ = load(tiny_llama("worded"))
    FastLanguageModel.get_peft_model(model, layers_to_transform=range(1), modules_to_save=("lm_head",))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["layers_to_transform"] == [0]


def test_the_tokenizer_beside_an_adapter_is_its_own(tiny_llama, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_llama("worded"))
    tokenizer.add_tokens(["<제비>"])
    model.resize_token_embeddings(len(tokenizer))
    FastLanguageModel.get_peft_model(model, modules_to_save=["embed_tokens"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    _, again = load(tmp_path)
    assert again("<제비>").input_ids == [len(tokenizer) - 1]
    assert again.padding_side == "left"


def test_an_adapter_says_that_it_was_trained_with_another_rope(
    tiny_llama, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load(tiny_llama("worded"), max_seq_length=320)
    FastLanguageModel.get_peft_model(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    load(tmp_path)
    assert "was trained with RoPE" in caplog.text
    assert "max_seq_length and rope_scaling of the training" in caplog.text
    caplog.clear()
    load(tmp_path, max_seq_length=320)
    assert "was trained with RoPE" not in caplog.text


def test_saving_does_not_pretend_to_push(tiny_llama, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="drop push_to_hub=True"):
        load(tiny_llama("worded"))[0].save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("bits", [{"load_in_4bit": False}, {}, {"load_in_8bit": True}])
def test_a_loaded_model_is_not_cast(tiny_llama, bits: dict[str, bool]) -> None:
    """Casts would round the weights and leave what is computed in as it was."""
    model, _ = load(tiny_llama("worded"), dtype=torch.bfloat16, **bits)
    FastLanguageModel.get_peft_model(model, r=4)
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    casts: list[Callable[[], Any]] = [model.half, model.float, model.double, lambda: model.to(torch.float16)]
    casts += [lambda: model.to("cpu", dtype=torch.float32), lambda: model.type(torch.float16)]
    for cast in casts:
        with pytest.raises(ModelError, match=r"in torch.bfloat16 is not cast to torch\..*with dtype= .* in from_pre"):
            cast()
    for same in (model.bfloat16(), model.to(torch.bfloat16), model.to("cpu"), model.to("cpu", torch.bfloat16)):
        assert same is model
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}, "adapters stay masters"
    reward = FastLanguageModel.reward_model_of(model)
    assert reward.to(torch.bfloat16).score.weight.dtype == torch.float32
