"""``models.families``: configs read, or refused before any weight is; RoPE stretched as transformers stretches it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from jebi.errors import ModelError
from jebi.fast import FastLanguageModel
from jebi.models.families import extend_context, read_config, rope_frequencies
from jebi.models.files import find
from jebi.models.loading import load_model

CPU = torch.device("cpu")


def with_config(folder: Path, **changes: object) -> Path:
    """A folder with a changed config.json and no weights at all: whoever reads them fails otherwise."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4).to_dict() | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> None:
    files = find(str(folder))
    load_model(files, files.config(), torch.float32, CPU, "dense")


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "mistral"])
def test_other_families_are_refused_before_any_weight_is_read(tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ModelError, match=f"model type '{model_type}' is not supported. Supported: llama."):
        load(with_config(tmp_path, model_type=model_type))


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)config.json' cannot be read: .*nonsense"):
        load(with_config(tmp_path, model_type="nonsense"))


def test_other_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hidden_act 'gelu' is not supported in a llama model; supported: silu"):
        load(with_config(tmp_path, hidden_act="gelu"))


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
    assert (layer.attention_bias, layer.mlp_bias) == (True, False)
    assert (shape.layers, shape.vocabulary, shape.tied) == (3, 77, True)


def test_heads_share_the_width_when_no_size_is_stated() -> None:
    config = LlamaConfig(hidden_size=96, num_attention_heads=6)
    config.head_dim = None
    assert read_config(config).layer.head_dim == 16
    assert rope_frequencies(config, CPU)[0].shape == (8,)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_frequencies_are_transformers_own(parameters: dict[str, object]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=parameters)
    theirs = LlamaRotaryEmbedding(config)
    inv_freq, scaling = rope_frequencies(config, CPU)
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert scaling == theirs.attention_scaling


def test_a_longer_row_stretches_rope_as_transformers_does(tiny_llama, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="jebi"):
        model, _ = FastLanguageModel.from_pretrained(
            str(tiny_llama("worded")), max_seq_length=320, dtype=torch.float32, load_in_4bit=False, device="cpu"
        )
    assert caplog.messages == ["max_seq_length 320 exceeds the model's 128: RoPE scaled linearly by 2.5"]
    assert model.config.max_position_embeddings == model.max_seq_length == 320
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama("worded"),
        dtype=torch.float32,
        max_position_embeddings=320,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    )
    ids = torch.randint(49152, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = model(ids).logits, theirs(ids).logits
    # Of the largest logit, float32's roundings over two layers; without the stretch it is off by more than a tenth.
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_row_within_the_models_length_stretches_nothing(tiny_llama) -> None:
    config = find(str(tiny_llama())).config()
    before = dict(config.rope_parameters)
    assert extend_context(config, 128) is None
    assert config.rope_parameters == before


def test_stretching_twice_multiplies() -> None:
    config = LlamaConfig(
        max_position_embeddings=100, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    )
    assert extend_context(config, 150) == "max_seq_length 150 exceeds the model's 100: RoPE scaled linearly by 3"
    assert config.rope_parameters["factor"] == 3.0


def test_scaled_rope_is_not_stretched_further(tiny_llama) -> None:
    with pytest.raises(ModelError, match=r"max_seq_length=256 exceeds .* 128.*'llama3'.*Set max_seq_length to 128"):
        extend_context(find(str(tiny_llama("llama3"))).config(), 256)
