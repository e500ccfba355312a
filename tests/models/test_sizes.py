"""``models.sizes``: shapes without torch are the shapes that transformers' configs give."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from jebi.errors import ModelError
from jebi.models.families import FAMILIES, read_config
from jebi.models.files import find
from jebi.models.known_shapes import KNOWN
from jebi.models.sizes import of_document, read_sizes

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "said",
    [{}, {"num_key_value_heads": 4, "head_dim": 32}, {"use_sliding_window": True, "max_window_layers": 3},
     {"sliding_window": 77}, {"tie_word_embeddings": True, "attention_bias": True}, {"sliding_window_pattern": 3}],
    ids=str,
)  # fmt: skip
def test_what_a_config_leaves_out_is_transformers_default(model_type: str, said: dict[str, Any]) -> None:
    if model_type == "phi3" and "head_dim" in said:
        said = {"num_key_value_heads": 4}
    document = SIZES | said | {"model_type": model_type}
    if model_type == "phi3":
        document["pad_token_id"] = 0
    expected = read_config(AutoConfig.for_model(**document))
    assert of_document(document, Path("config.json")) == expected


def test_what_lacks_a_size_is_read_by_transformers(tmp_path: Path) -> None:
    document = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_sizes(str(tmp_path)).shape == read_config(AutoConfig.for_model(**document))


def test_the_embedded_model_and_its_built_in_shape_are_one() -> None:
    found = read_sizes("smollm2")
    assert found.shape == read_config(find("smollm2").config())
    known = read_sizes("SmolLM2-135M")
    assert known.built_in
    assert not found.built_in
    assert known.shape.vocabulary == found.shape.vocabulary
    assert len(known.shape.layers) == len(found.shape.layers)


@pytest.mark.parametrize("name", KNOWN)
def test_built_in_shapes_are_about_as_large_as_their_names_say(name: str) -> None:
    """Names round: a "7b" has 7.2 or 7.6 billion numbers, and Gemma's leave out the embedding's."""
    size = (
        next(part for part in reversed(name.split("-")) if part[-1] in "bm" and part[0].isdigit())
        if any(part[-1] in "bm" and part[0].isdigit() for part in name.split("-"))
        else {"phi-3.5-mini": "3.8b", "phi-4": "14.7b"}[name]
    )
    named = float(size[:-1]) * (1e9 if size[-1] == "b" else 1e6)
    shape = read_sizes(name).shape
    layers = sum(one.outputs * one.inputs for layer in shape.layers for _, one in layer.maps())
    tables = shape.vocabulary * shape.layer.width * (1 if shape.tied else 2)
    assert 0.85 * named <= layers + tables <= 1.32 * named


@pytest.mark.parametrize(
    ("name", "says"),
    [("nothing", "Shapes that jebi knows"), ("/nowhere/model.gguf", "there is no file"), ("gpt-2", "llama-3.1-8b")],
)
def test_what_is_not_there_is_told_with_what_is(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_sizes(name)


def test_other_folders_and_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        read_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    with pytest.raises(ModelError, match="mixture of experts"):
        read_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_sizes(str(tmp_path))


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from jebi.models.sizes import read_sizes; read_sizes('smollm2'); read_sizes('gemma-3-1b'); "
        "import jebi.plan.passes, jebi.plan.time; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
