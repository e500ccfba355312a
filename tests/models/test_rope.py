"""``models.rope``: every kind of RoPE against transformers' own, and configs changed for longer rows."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jebi.errors import ModelError
from jebi.fast import FastLanguageModel
from jebi.models.rope import read_rotary, scale_context
from jebi.nn.rows import rows_from_lengths

CPU = torch.device("cpu")

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + n / 10 for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
        "original_max_position_embeddings": 32,
    },
}
"""For heads of 16 and 128 positions."""

LENGTHS = [7, 32, 33, 128, 129, 500]


def llama(parameters: dict[str, Any], **changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    return LlamaConfig(**settings | changes, rope_parameters=dict(parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_transformers_own(kind: str) -> None:
    config = llama(KINDS[kind])
    ours = read_rotary(config, CPU)["full_attention"].of_rows(rows_from_lengths(LENGTHS, CPU), torch.float32)
    rows = zip(*(table.split(LENGTHS) for table in ours))
    for length, mine in zip(LENGTHS, rows):
        # One of theirs a row: theirs remembers the longest row it has seen.
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(()), torch.arange(length)[None])
        for table, expected in zip(mine, theirs):
            assert torch.equal(table, expected[0])


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


def test_a_row_within_the_models_length_stretches_nothing() -> None:
    config = llama(KINDS["yarn"])
    before = dict(config.rope_parameters)
    assert scale_context(config, 128, None) is None
    assert config.rope_parameters == before


def test_stretching_twice_multiplies() -> None:
    config = LlamaConfig(
        max_position_embeddings=100, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    )
    assert scale_context(config, 150, None) == "max_seq_length 150 exceeds the model's 100: RoPE scaled linearly by 3"
    assert config.rope_parameters["factor"] == 3.0


def test_longrope_is_not_stretched_further() -> None:
    with pytest.raises(ModelError, match=r"max_seq_length=256 exceeds .* 128.*'longrope'.*128 or less.*rope_scaling="):
        scale_context(llama(KINDS["longrope"]), 256, None)
