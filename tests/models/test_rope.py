"""``models.rope``: every kind of RoPE against transformers' own, and configs changed for longer rows."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config, PretrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from jebi.errors import ConfigError, ModelError
from jebi.inference.generation import prepare
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import load_model
from jebi.models.rope import read_rotary, scale_context
from jebi.nn.rotary import Rotary
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
"""For heads of 16 and 128 positions. Frequencies change at 32 tokens (longrope) or 128 (dynamic)."""

LENGTHS = [7, 32, 33, 128, 129, 1000]
"""Below, at and beyond both, and far beyond."""


def llama(parameters: dict[str, Any], **changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    return LlamaConfig(**settings | changes, rope_parameters=copy.deepcopy(parameters))


def phi3(**parameters: Any) -> Phi3Config:
    """Phi-3's head turns by three quarters, as in Phi-4-mini; its trained length stands beside the parameters."""
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.75} | parameters,
        pad_token_id=0,
    )


def gemma3(full: dict[str, Any]) -> Gemma3TextConfig:
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return Gemma3TextConfig(
        head_dim=16,
        max_position_embeddings=128,
        num_hidden_layers=6,
        rope_parameters={"full_attention": copy.deepcopy(full), "sliding_attention": local},
    )


def assert_tables(rotary: Rotary, make: Any, **layers: str) -> None:
    """Flat rows together and new tokens of a batch; theirs is made anew for each row, since it remembers the longest
    it has seen. Equal to the bit: the same functions on the same numbers."""
    ours = torch.stack(rotary.of_rows(rows_from_lengths(LENGTHS, CPU), torch.float32))
    cached = torch.stack(rotary.of_positions(torch.tensor(LENGTHS)[:, None] - 1, torch.float32))
    for number, (length, mine) in enumerate(zip(LENGTHS, ours.split(LENGTHS, dim=1), strict=True)):
        theirs = torch.stack(make()(torch.zeros(()), torch.arange(length)[None], **layers))
        assert torch.equal(mine, theirs[:, 0]), length
        assert torch.equal(cached[:, number], theirs[:, 0, -1:]), length


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_llama(kind: str) -> None:
    config = llama(KINDS[kind])
    rotary = read_rotary(config, CPU)
    assert rotary["sliding_attention"] is rotary["full_attention"]
    assert_tables(rotary["full_attention"], lambda: LlamaRotaryEmbedding(config))


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "longrope", "short_factor": [1.0 + n / 10 for n in range(6)], "long_factor": [4.0] * 6},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_tables_are_those_of_phi3(parameters: dict[str, Any]) -> None:
    config = phi3(**parameters)
    rotary = read_rotary(config, CPU)["full_attention"]
    assert rotary.inv_freq.shape == (6,)
    assert_tables(rotary, lambda: Phi3RotaryEmbedding(config))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_gemma3(kind: str) -> None:
    config = gemma3(KINDS[kind])
    rotary = read_rotary(config, CPU)
    for layers in ("full_attention", "sliding_attention"):
        assert_tables(rotary[layers], lambda: Gemma3RotaryEmbedding(config), layer_type=layers)


def test_a_config_changed_later_changes_nothing() -> None:
    config = llama(KINDS["dynamic"])
    rotary = read_rotary(config, CPU)["full_attention"]
    before = torch.stack(rotary.of_rows(rows_from_lengths(LENGTHS, CPU), torch.float32))
    config.max_position_embeddings = 4096
    config.rope_parameters["factor"] = 9.0
    again = pickle.loads(pickle.dumps(rotary))  # and a model may be sent to another process
    for one in (rotary, again):
        assert torch.equal(torch.stack(one.of_rows(rows_from_lengths(LENGTHS, CPU), torch.float32)), before)


def test_an_unknown_kind_is_refused() -> None:
    config = llama(KINDS["default"])
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ModelError, match=r"rope_type 'spiral' is not known. Known: default, linear, dynamic, yarn"):
        read_rotary(config, CPU)


def ids(length: int) -> Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(length))


def twins(folder: Path, config: PretrainedConfig) -> tuple[JebiForCausalLM, Any]:
    """jebi's model, and a function that makes transformers' afresh, both with the config's RoPE."""

    def theirs() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=copy.deepcopy(config.rope_parameters),
        )

    return load_model(find(str(folder)), copy.deepcopy(config), torch.float32, CPU, "dense"), theirs


def with_rope(folder: Path, parameters: dict[str, Any]) -> PretrainedConfig:
    config = find(str(folder)).config()
    config.rope_parameters = copy.deepcopy(parameters)
    return config


def assert_logits(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest logit: the tables are equal to the bit, so what may differ is float32's rounding
    (6e-8) in sums taken in another order over two layers; measured nothing. Another kind of RoPE shows as 0.8."""
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_rows_within_and_beyond_the_trained_length(tiny_llama, kind: str) -> None:
    """Three rows in one pass, each as transformers has it alone."""
    ours, theirs = twins(tiny_llama(), with_rope(tiny_llama(), KINDS[kind]))
    rows = [ids(length) for length in (100, 300, 20)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        together = ours(torch.cat(rows, dim=1), position_ids=positions).logits
        for row, mine in zip(rows, together.split([row.shape[1] for row in rows], dim=1), strict=True):
            assert_logits(mine, theirs()(row).logits)


@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "made ready to answer"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_a_batch_decodes_past_the_length_at_which_frequencies_change(tiny_llama, kind: str, ready: bool) -> None:
    """From 4 tokens before it to 8 beyond, beside a much shorter row: the tokens transformers says for each alone."""
    at = {"longrope": 32}.get(kind, 128)
    ours, theirs = twins(tiny_llama(), with_rope(tiny_llama(), KINDS[kind]))
    if ready:
        prepare(ours)
    long, short = ids(at - 4), ids(9)
    padded = torch.cat((torch.zeros(1, at - 13, dtype=torch.long), short), dim=1)
    mask = torch.ones(2, at - 4, dtype=torch.long)
    mask[1, : at - 13] = 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    made = ours.generate(torch.cat((long, padded)), attention_mask=mask, **settings)
    for prompt, answer in zip((long, short), made[:, -12:], strict=True):
        expected = theirs().generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert answer.tolist() == expected[0, -12:].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_within_the_models_length_changes_nothing(kind: str) -> None:
    config = llama(KINDS[kind])
    before = config.to_dict()
    assert scale_context(config, 128, None) is None
    assert config.to_dict() == before


CARRIED_ON = {
    "default": ({"rope_type": "linear", "factor": 2.5}, "RoPE scaled linearly by 2.5"),
    "linear": ({"factor": 7.5}, "RoPE scaled linearly by 7.5"),
    "dynamic": ({}, "nothing to scale, its dynamic RoPE follows each row's length"),
    "yarn": ({"factor": 10.0}, "YaRN's factor raised from 4 to 10"),
    "llama3": ({"factor": 10.0}, "the factor of its llama3 RoPE raised from 4 to 10"),
}


@pytest.mark.parametrize("kind", CARRIED_ON)
def test_each_kind_is_carried_on_to_longer_rows(tiny_llama, kind: str) -> None:
    changes, sentence = CARRIED_ON[kind]
    config = with_rope(tiny_llama(), KINDS[kind])
    assert scale_context(config, 320, None) == f"max_seq_length 320 exceeds the model's 128: {sentence}"
    assert config.rope_parameters == KINDS[kind] | changes
    assert config.max_position_embeddings == (128 if kind == "dynamic" else 320)
    ours, theirs = twins(tiny_llama(), config)
    with torch.no_grad():
        assert_logits(ours(ids(320)).logits, theirs()(ids(320)).logits)


def test_yarn_whose_factor_is_larger_keeps_it() -> None:
    config = llama(KINDS["yarn"] | {"factor": 16.0})
    assert "its YaRN reaches that far, by a factor of 16" in str(scale_context(config, 320, None))
    assert config.rope_parameters["factor"] == 16.0
    assert config.max_position_embeddings == 320


def test_longrope_is_not_carried_on() -> None:
    config = llama(KINDS["longrope"])
    before = config.to_dict()
    with pytest.raises(ModelError, match=r"max_seq_length=256 exceeds .* 128.*'longrope'.*128 or less.*rope_scaling="):
        scale_context(config, 256, None)
    assert config.to_dict() == before


ASKED = {kind: {k: v for k, v in KINDS[kind].items() if k != "rope_theta"} for kind in KINDS}


@pytest.mark.parametrize("old", ["llama3", "yarn"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaling_asked_for_takes_the_models_place(tiny_llama, kind: str, old: str) -> None:
    config = with_rope(tiny_llama(), KINDS[old] | {"rope_theta": 7777.0})
    scale_context(config, 320, ASKED[kind])
    assert config.rope_parameters == ASKED[kind] | {"rope_theta": 7777.0}
    assert config.max_position_embeddings == (128 if kind == "dynamic" else 320)
    ours, theirs = twins(tiny_llama(), config)
    with torch.no_grad():
        for length in (20, 320):
            assert_logits(ours(ids(length)).logits, theirs()(ids(length)).logits)


def test_what_is_missing_comes_from_the_config() -> None:
    config = llama(KINDS["default"])
    assert scale_context(config, 512, {"type": "yarn", "factor": 4}) is None
    expected = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 128, "rope_theta": 500000.0}
    assert config.rope_parameters == expected
    config = llama(KINDS["llama3"])  # trained on 32 tokens before it was scaled to 128
    scale_context(config, 100, {"rope_type": "yarn", "factor": 8.0})
    assert config.rope_parameters["original_max_position_embeddings"] == 32
    assert config.max_position_embeddings == 128


def test_what_the_asked_scaling_does_not_reach_is_told() -> None:
    config = llama(KINDS["default"])
    notice = scale_context(config, 512, {"rope_type": "yarn", "factor": 2.0})
    assert notice is not None
    assert "rope_scaling's factor 2 reaches 256 tokens, and max_seq_length is 512" in notice
    assert scale_context(llama(KINDS["default"]), 512, {"rope_type": "dynamic", "factor": 2.0}) is None


def test_only_the_global_layers_of_gemma3_are_scaled() -> None:
    for asked in (None, {"rope_type": "linear", "factor": 2.5}):
        config = gemma3({"rope_type": "default", "rope_theta": 1e6})
        scale_context(config, 320, asked)
        assert config.rope_parameters == {
            "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
        assert config.max_position_embeddings == 320
        rotary = read_rotary(config, CPU)
        for layers in ("full_attention", "sliding_attention"):
            assert_tables(rotary[layers], lambda config=config: Gemma3RotaryEmbedding(config), layer_type=layers)


def test_phi3s_own_trained_length_gives_way_to_the_one_asked_for() -> None:
    config = phi3(rope_type="default")
    asked = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    scale_context(config, 256, asked)
    assert config.rope_parameters["original_max_position_embeddings"] == 32
    scale_context(config, 256, asked | {"original_max_position_embeddings": 64})
    assert config.original_max_position_embeddings == 64
    assert config.rope_parameters["partial_rotary_factor"] == 0.75
    rotary = read_rotary(config, CPU)["full_attention"]
    assert rotary.reach == 64
    assert_tables(rotary, lambda: Phi3RotaryEmbedding(config))


def test_a_scaling_that_is_no_dictionary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'rope_scaling must be a dictionary, such as .*"factor": 4.0}, not \'yarn\''):
        scale_context(llama(KINDS["default"]), 512, "yarn")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, r"rope_type None is not known; use one of default, linear"),
        ({"rope_type": "spiral", "factor": 2.0}, r"rope_type 'spiral' is not known"),
        ({"rope_type": ["yarn"]}, r"rope_type \['yarn'\] is not known"),
        (
            {"type": "yarn"},
            r"yarn needs 'factor'; add it, such as rope_scaling=\{\"rope_type\": \"yarn\", \"factor\": 4.0",
        ),
        ({"rope_type": "llama3", "factor": 2.0}, r"llama3 needs 'low_freq_factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8}, r"longrope needs 'long_factor'"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor must be at least 1, not 0.5"),
        ({"rope_type": "linear", "factor": "4"}, r"factor must be a number above 0, not '4'"),
        ({"rope_type": "linear", "factor": True}, r"factor must be a number above 0, not True"),
        ({"rope_type": "linear", "factor": float("nan")}, r"factor must be a number above 0, not nan"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, r"'beta_fast' is no setting of linear; its are"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, r"truncate must be true or false, not 1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}, r"beta_slow must be below beta_fast"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            r"low_freq_factor must be below high_freq_factor, not 4 and 1",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7},
            r"long_factor must be a list of 8 numbers above 0",
        ),
    ],
    ids=str,
)
def test_an_impossible_scaling_is_refused_by_name(asked: dict[str, Any], message: str) -> None:
    config = llama(KINDS["default"])
    before = config.to_dict()
    with pytest.raises(ConfigError, match=f"rope_scaling: {message}"):
        scale_context(config, 512, asked)
    assert config.to_dict() == before
