"""``models.families``: configs read, or refused before any weight is."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

from jebi.errors import ModelError
from jebi.models.families import FAMILIES, read_config
from jebi.models.files import find
from jebi.models.loading import load_model
from jebi.models.rope import read_rotary

CPU = torch.device("cpu")


def with_config(folder: Path, **changes: object) -> Path:
    """A folder with a changed config.json and no weights at all: whoever reads them fails otherwise."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict() | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> None:
    files = find(str(folder))
    load_model(files, files.config(), torch.float32, CPU, "dense")


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt2", ""),
        ("mixtral", " (a mixture of experts)"),
        ("qwen3_moe", " (a mixture of experts)"),
        ("gemma3", " (with a vision tower)"),
        ("llava", " (with a vision tower)"),
    ],
)
def test_other_families_are_refused_before_any_weight_is_read(tmp_path: Path, model_type: str, why: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    message = f"model type '{model_type}'{why} is not supported. Supported: {', '.join(sorted(FAMILIES))}."
    with pytest.raises(ModelError, match=re.escape(message)):
        load(tmp_path)


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)config.json' cannot be read: .*nonsense"):
        load(with_config(tmp_path, model_type="nonsense"))


def test_other_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="activation 'relu' of the model's config is not supported; supported: silu, "):
        load(with_config(tmp_path, hidden_act="relu"))


def test_embedding_models_are_refused(tmp_path: Path) -> None:
    Gemma3TextConfig(use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="use_bidirectional_attention=true"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4, which is no multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; a number above 0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0; a number above 0 is needed, or null"),
        (
            {"model_type": "gemma2", "sliding_window": None},
            "layer_types with 'sliding_attention', and no sliding_window",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0; a number above 0"),
        ({"partial_rotary_factor": 0.5, "rope_theta": 1e4}, "partial_rotary_factor, which 'llama' models do not"),
    ],
)
def test_impossible_sizes_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(with_config(tmp_path, **changes))


def test_layer_types_must_be_known_and_as_many_as_layers() -> None:
    config = Qwen3Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match=r"layer type 'linear_attention'.* supported: full_attention, sliding"):
        read_config(config)
    config.layer_types = ["full_attention"]
    with pytest.raises(ModelError, match="num_hidden_layers=2, and layer_types for 1"):
        read_config(config)


def test_dropout_is_said_not_to_happen(caplog: pytest.LogCaptureFixture) -> None:
    read_config(LlamaConfig(attention_dropout=0.1))
    assert "attention_dropout=0.1" in caplog.text
    read_config(Phi3Config(resid_pdrop=0.2, pad_token_id=0))
    assert "resid_pdrop=0.2" in caplog.text


def test_sizes_are_those_of_the_config() -> None:
    shape = read_config(
        LlamaConfig(
            hidden_size=96,
            intermediate_size=200,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=20,
            vocab_size=77,
            attention_bias=True,
            tie_word_embeddings=True,
        )
    )
    layer = shape.layer
    assert (layer.width, layer.ffn, layer.heads, layer.kv_heads, layer.head_dim) == (96, 200, 6, 2, 20)
    assert (layer.qkv_bias, layer.o_bias, layer.mlp_bias) == (True, True, False)
    assert (len(shape.layers), shape.vocabulary, shape.tied) == (3, 77, True)


def test_heads_share_the_width_when_no_size_is_stated() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6)
    config.head_dim = None
    assert read_config(config).layer.head_dim == 16
    assert read_rotary(config, CPU)["full_attention"].inv_freq.shape == (8,)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3", {"attention_bias": True}),
        ("gemma", {"attention_bias": True}),
        ("gemma2", {"attention_bias": True}),
        ("gemma3_text", {"attention_bias": True, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"hidden_act": "gelu_new"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_a_config_may_say_beside_means_what_transformers_means(
    tmp_path: Path, model_type: str, changes: dict[str, object]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    files, ids = find(str(tmp_path)), torch.arange(3, 12)[None]
    ours, expected = load_model(files, files.config(), torch.float32, CPU, "dense")(ids).logits, theirs(ids).logits
    exact = theirs.double()(ids).logits
    # At most twice transformers' own error, one rounding granted; the two forms of GELU differ by 1e-3.
    own, other = (ours - exact).abs().max(), (expected - exact).abs().max()
    assert own <= 2 * max(other, torch.finfo(torch.float32).eps * exact.abs().max())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_theta": None}, "'rope_theta': None.* make no RoPE"),
        ({"rope_theta": 1e4, "rope_type": "linear", "factor": "two"}, "'factor': 'two'.* make no RoPE"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 2.0}, "turn 32 of a head's 16"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.07}, "turn 1 of a head's 16; an even part"),
    ],
)
def test_parameters_that_make_no_rope_are_named(parameters: dict[str, object], message: str) -> None:
    config = Phi3Config(hidden_size=64, num_attention_heads=4, pad_token_id=0)
    config.rope_parameters = parameters
    with pytest.raises(ModelError, match=message):
        read_rotary(config, CPU)
