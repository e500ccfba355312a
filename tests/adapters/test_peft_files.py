"""``adapters.peft_files``: PEFT reads what jebi writes and the other way round; what does not fit is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from jebi.adapters import peft_config, peft_files
from jebi.adapters.lora import attach
from jebi.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE, read_config
from jebi.adapters.peft_files import adapter_tensors, read_weights
from jebi.config import LoraConfig
from jebi.errors import AdapterError
from jebi.fast import FastLanguageModel

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of trained embeddings

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))

KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "two targets, all biases": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "two targets, their biases": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"use_rslora": True, "r": 9},
    "broken alpha": {"lora_alpha": 5.5},
    "expression": {"target_modules": r".*\.1\.(self_attn\.[qv]|mlp\.down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"exclude_modules": ["k_proj", "model.layers.1.mlp.up_proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "ranks and alphas": {"rank_pattern": {"q_proj": 2, r"1\.mlp.*": 5}, "alpha_pattern": {"self_attn.o_proj": 9}},
    "DoRA": {"use_dora": True},
    "DoRA, rslora, biases": {"use_dora": True, "use_rslora": True, "bias": "all"},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "a whole projection": {"modules_to_save": ["1.mlp.down_proj"], "bias": "lora_only"},
    "norms": {"modules_to_save": ["input_layernorm", "model.norm"]},
}
OWN: dict[str, dict[str, Any]] = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA by rounds": {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    "PiSSA and more": {
        "init_lora_weights": "pissa",
        "use_dora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 9},
    },
}
"""Those that PEFT reads but has no such settings for in the file it reads."""

kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
all_kinds = pytest.mark.parametrize("settings", (KINDS | OWN).values(), ids=(KINDS | OWN).keys())


def trained(load, folder: Path, **settings: Any):
    """A model whose adapter and biases are no longer what they were."""
    model = load(folder)
    attach(model, LoraConfig(**{"r": 4, "lora_alpha": 6} | settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of the largest logit: float32's roundings over two layers; a wrong scale or a bias left out is off by 1e-2."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.fixture
def folder(tiny_llama, load, tmp_path: Path) -> Path:
    """An adapter that jebi wrote."""
    trained(load, tiny_llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@all_kinds
@torch.no_grad()
def test_peft_reads_what_jebi_writes(tiny_llama, load, tmp_path: Path, settings: dict[str, Any]) -> None:
    ours = trained(load, tiny_llama("biased"), **settings)
    ours.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    base = AutoModelForCausalLM.from_pretrained(tiny_llama("biased"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    close(ours(IDS).logits, theirs(IDS).logits)
    # Nothing was read past: PEFT writes the same tensors again.
    theirs.save_pretrained(tmp_path / "again")
    written, again = load_file(tmp_path / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert written.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in written.items())


@kinds
@torch.no_grad()
def test_jebi_reads_what_peft_writes(tiny_llama, load, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama("biased"), dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 6, "target_modules": list(LoraConfig().target_modules)} | settings
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    ours = FastLanguageModel.put_adapter(load(tiny_llama("biased")), tmp_path)
    close(ours(IDS).logits, theirs(IDS).logits)


@all_kinds
@torch.no_grad()
def test_round_trip_to_the_bit(tiny_llama, load, tmp_path: Path, settings: dict[str, Any]) -> None:
    ours = trained(load, tiny_llama("biased"), **settings)
    ours.save_pretrained(tmp_path)
    again = FastLanguageModel.put_adapter(load(tiny_llama("biased")), tmp_path)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    assert dataclasses.replace(read_config(tmp_path), random_state=3407) == ours.adapter.config


def test_what_the_config_says(tiny_llama, load, tmp_path: Path) -> None:
    trained(load, tiny_llama(), bias="none").save_pretrained(tmp_path)
    document = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert document["base_model_name_or_path"] == str(tiny_llama())
    assert (document["peft_type"], document["task_type"], document["r"]) == ("LORA", "CAUSAL_LM", 4)
    assert document["lora_alpha"] == 6
    assert isinstance(document["lora_alpha"], int)
    assert document.keys() <= {field.name for field in dataclasses.fields(peft.LoraConfig)}


@torch.no_grad()
def test_another_precision_is_cast(tiny_llama, load, folder: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    model = FastLanguageModel.put_adapter(load(tiny_llama()), folder)
    for name, tensor in adapter_tensors(model).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name].float())


def test_an_adapter_of_another_model(load, folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"vocab_size": 20, "num_attention_heads": 2, "num_key_value_heads": 2}
    deeper = LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=3, **config)
    wider = LlamaConfig(hidden_size=32, intermediate_size=176, num_hidden_layers=2, **config)
    for name, theirs in (("deeper", deeper), ("wider", wider)):
        LlamaForCausalLM(theirs).save_pretrained(tmp_path / name)
    message = r"was made for another model: tensor '.*layers.2.*' is not in the adapter"
    with pytest.raises(AdapterError, match=message):
        FastLanguageModel.put_adapter(load(tmp_path / "deeper"), folder)
    message = (
        rf"adapter '{folder}' .* another model: tensor '.*lora_A.weight' has shape \[4, 64\], the model needs \[4, 32\]"
    )
    with pytest.raises(AdapterError, match=message):
        FastLanguageModel.put_adapter(load(tmp_path / "wider"), folder)


def test_a_tensor_too_many(tiny_llama, load, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, folder / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=r"tensor 'base_model.model.lm_head.lora_A.weight' is not in the model"):
        FastLanguageModel.put_adapter(load(tiny_llama()), folder)


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file(tiny_llama, load, folder: Path, size: int) -> None:
    path = folder / WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(AdapterError, match=f"'{path}' is missing or broken"):
        FastLanguageModel.put_adapter(load(tiny_llama()), folder)


def test_a_missing_file(tiny_llama, load, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterError, match=f"'{folder / WEIGHTS_FILE}' is missing or broken"):
        FastLanguageModel.put_adapter(load(tiny_llama()), folder)
    with pytest.raises(AdapterError, match=f"adapter '{tmp_path}' has no {CONFIG_FILE}; name a folder that a training"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ['{"peft_type": "LO', "[]", ""])
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(AdapterError, match=f"'{folder / CONFIG_FILE}'"):
        read_config(folder)
    with pytest.raises(AdapterError, match=f"'{folder / CONFIG_FILE}'"):
        FastLanguageModel.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "is of type IA3; jebi reads LORA"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"target_modules": None}, r"target_modules must be names or an expression, not None"),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj' is no regular expression"),
        ({"ensure_weight_tying": True}, r"trained copies that stay tied \(ensure_weight_tying\)"),
        ({"r": None}, "lacks r"),
        ({"r": 0}, "r must be a whole number above 0"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, not 'some'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_adapters_of_other_kinds_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    change(folder, **settings)
    with pytest.raises(AdapterError, match=message) as caught:
        read_config(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_are_fine(folder: Path, start: bool | str) -> None:
    change(folder, init_lora_weights=start)
    assert read_config(folder).r == 4


def test_every_setting_of_peft_is_accounted_for() -> None:
    """A setting that a new PEFT brings is either read, refused, or known to change nothing about what is computed."""
    read = {"peft_type", "init_lora_weights", *peft_config._SAME}
    without_effect = {
        "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
        "megatron_core", "qalora_group_size",  # likewise with megatron_config and use_qalora
        "runtime_config",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of starts, which init_lora_weights names
    }  # fmt: skip
    known = read | without_effect | set(peft_config._UNSUPPORTED)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - known == set()


def test_nothing_half_written(tiny_llama, load, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_files, "save_file", fail)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            trained(load, tiny_llama(), r=8).save_pretrained(target)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert list((folder.parent / "new").iterdir()) == []
    assert {path.name for path in folder.iterdir()} == before.keys()


def test_an_older_adapter_is_replaced(tiny_llama, load, folder: Path) -> None:
    ours = trained(load, tiny_llama(), r=8)
    ours.save_pretrained(folder)
    assert read_config(folder).r == 8
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    again = FastLanguageModel.put_adapter(load(tiny_llama()), folder)
    assert torch.equal(again(IDS).logits, ours(IDS).logits)


@torch.no_grad()
def test_weights_read_into_a_model_that_answers_already(tiny_llama, load, folder: Path) -> None:
    expected = FastLanguageModel.put_adapter(load(tiny_llama()), folder)(IDS).logits
    model = load(tiny_llama())
    attach(model, read_config(folder))
    FastLanguageModel.for_inference(model)
    read_weights(model, folder)
    assert torch.equal(model(IDS).logits, expected)
