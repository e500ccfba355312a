"""``models.families``: configs read, or refused before any weight is."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from jebi.errors import ModelError
from jebi.models.families import read_config
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
    load_model(files, files.config(), torch.float32, CPU, False)


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
    assert read_rotary(config, CPU)["full_attention"].inv_freq.shape == (8,)
