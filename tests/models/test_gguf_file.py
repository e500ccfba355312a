"""``models.gguf_file``: SmolLM2's file read as transformers reads it, small files of other forms, and broken ones."""

import copy
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from jebi.errors import ModelError, WeightsError
from jebi.models.files import embedded_file, find
from jebi.models.gguf_file import GgufFile
from jebi.models.rope import read_rotary

TEXTS = [
    "What is the capital of France?",
    "대한민국의 수도는 서울입니다. 김치찌개 2인분, 부탁해요!",
    "<|im_start|>user\n안녕하세요<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>after<|im_end|>",
    "def f(x):\n\treturn x ** 2  # 12345 + 0.5\r\n",
    "  leading, trailing  ",
    "🎉 émoji, naïve – “quotes”",
    "",
]


@pytest.fixture(scope="module")
def embedded() -> GgufFile:
    return GgufFile(embedded_file())


def test_every_tensor_is_transformers_own(embedded: GgufFile, smollm2_folder: Path) -> None:
    theirs = load_file(smollm2_folder / "model.safetensors")
    for stored in embedded.tensors():
        value = stored.read()
        assert value.shape == stored.shape
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs.pop(stored.name)), stored.name
    assert theirs == {}


def test_config_is_transformers_own(embedded: GgufFile, smollm2_folder: Path) -> None:
    ours, theirs = embedded.config().to_dict(), AutoConfig.from_pretrained(smollm2_folder).to_dict()
    for note in ("_name_or_path", "_model_name_or_path", "dtype", "unk_token_id"):
        ours.pop(note, None), theirs.pop(note, None)
    assert ours == theirs
    assert embedded.generation_config() is None


def test_tokenizer_is_transformers_own(embedded: GgufFile, smollm2_folder: Path) -> None:
    ours, theirs = embedded.tokenizer(), AutoTokenizer.from_pretrained(smollm2_folder)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == (theirs.bos_token, theirs.eos_token, theirs.unk_token)
    for text in TEXTS:
        for special in (True, False):
            ids = ours(text, add_special_tokens=special)["input_ids"]
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
            assert ours.decode(ids) == theirs.decode(ids), text
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "안녕?"}]
    forms = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert forms[0] == forms[1]
    assert "<|im_start|>user\n안녕?<|im_end|>" in forms[0]


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_rows_of_q_and_k_come_back_in_order(write_gguf, tiny_llama, load, tmp_path: Path, variant: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(variant))
    stored = {tensor.name: tensor.read() for tensor in GgufFile(path).tensors()}
    original = load_file(tiny_llama(variant) / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in original.items())
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(path)(ids).logits, load(tiny_llama(variant))(ids).logits)
    assert torch.equal(copy.deepcopy(load(path))(ids).logits, load(path)(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_block_types_that_can_be_written(write_gguf, tiny_llama, tmp_path: Path, kind: str) -> None:
    original = load_file(tiny_llama("even") / "model.safetensors")
    # As a share of the largest value. Floats: half of the last bit. Q4_0 and Q5_0 reach their largest on one side of
    # zero alone, and on the other may be off by a step; the rest by half a step, which in Q4_1 and Q5_1 divides the
    # distance from the least to the largest. Scales are float16: one rounding, three where a block has two numbers.
    floats = {"F16": 2**-11, "BF16": 2**-8}
    steps = {"Q8_0": 1 / 254, "Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31}
    bound = floats[kind] if kind in floats else steps[kind] + (3 if kind.endswith("_1") else 1) * 2**-11
    for stored in GgufFile(write_gguf(tmp_path / "tiny.gguf", tiny_llama("even"), kind=kind)).tensors():
        exact = original[stored.name]
        assert (stored.read() - exact).abs().max() <= bound * exact.abs().max(), stored.name


# Where a block's float16 numbers stand, scale first; the other bytes may be anything.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


@pytest.mark.parametrize("kind", HALVES)
def test_every_block_type_as_transformers_dequantises_it(tmp_path: Path, kind: str) -> None:
    rows, columns = 6, 512
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    chance = np.random.default_rng(0)
    blocks = chance.integers(0, 256, (rows * columns // values, size), dtype=np.uint8)
    for place in HALVES[kind]:
        blocks[:, place : place + 2] = chance.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_up.weight", blocks.reshape(rows, -1), raw_dtype=number)
    writer.add_tensor("output_norm.weight", np.arange(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored, norm = GgufFile(tmp_path / "blocks.gguf").tensors()
    assert (stored.name, stored.shape) == ("model.layers.0.mlp.up_proj.weight", (rows, columns))
    ours = stored.read()
    assert ours.shape == stored.shape
    assert torch.equal(ours, torch.from_numpy(gguf.quants.dequantize(blocks.reshape(rows, -1), number)))
    assert ours.std() > 0
    assert norm.read().tolist() == [0, 1, 2, 3]
    theirs = pytest.importorskip("transformers.integrations.gguf.dequant", reason="a transformers of before 2026")
    if int(number) in theirs.GGML_BLOCK:
        expected = theirs.dequantize(torch.from_numpy(blocks.reshape(-1)), int(number)).view(rows, columns)
        # Two float32 roundings at most: they multiply the same three numbers in another order.
        assert (ours - expected).abs().max() <= 2**-21 * expected.abs().max()


def test_other_architectures_are_refused_by_name(write_gguf, tiny_llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="mistral3")
    supported = "llama, qwen2, qwen3, gemma, gemma2, gemma3, phi3"
    with pytest.raises(
        ModelError, match=f"'other.gguf' holds architecture 'mistral3'. Supported in GGUF files: {supported}"
    ):
        find(str(path)).config()


def test_layers_that_differ_are_refused(write_gguf, tiny_llama, tmp_path: Path) -> None:
    same = write_gguf(tmp_path / "same.gguf", tiny_llama(), fields={"feed_forward_length": [176, 176]})
    assert find(str(same)).config().intermediate_size == 176
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(), fields={"feed_forward_length": [176, 96]})
    with pytest.raises(ModelError, match=r"other.gguf': 'llama.feed_forward_length' differs between layers"):
        find(str(other)).config()


def test_a_missing_header_field_is_named(write_gguf, tiny_llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), without="block_count")
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}' lacks the header field 'llama.block_count'"):
        find(str(path)).config()


def test_rope_of_llama_3_1(write_gguf, tiny_llama, load, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama("llama3"))
    exact, plain = (
        read_rotary(config, torch.device("cpu"))["full_attention"].inv_freq for config in (config, plain_rope(config))
    )
    divisors = plain / exact
    assert divisors[0] == 1
    assert divisors[-1] == 4
    assert 1 < divisors[1] < 4
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama("llama3"), extra={"rope_freqs.weight": divisors.numpy()})
    ours = read_rotary(find(str(path)).config(), torch.device("cpu"))["full_attention"]
    assert ours.scaling == 1.0
    # Two roundings of float32: the divisor's, and that of dividing by a product instead of twice.
    assert ((ours.inv_freq - exact).abs() <= 2**-22 * exact).all()
    ids = torch.randint(3, 300, (2, 100), generator=torch.Generator().manual_seed(0))
    logits, expected = load(path)(ids).logits, load(tiny_llama("llama3"))(ids).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (load(write_gguf(tmp_path / "plain.gguf", tiny_llama("llama3")))(ids).logits - expected).abs().max() > 0.1


def plain_rope(config: PretrainedConfig) -> PretrainedConfig:
    plain = copy.deepcopy(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    return plain


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"rope.freq_base": 5000.0, "rope.scaling.type": "none"}, {"rope_type": "default", "rope_theta": 5000.0}),
    ],
    ids=["linear", "yarn", "none"],
)
def test_rope_scaled_in_the_header(write_gguf, tiny_llama, tmp_path: Path, fields, parameters) -> None:
    config = find(str(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), fields=fields))).config()
    assert config.rope_parameters == {"rope_theta": 10000.0} | parameters
    read_rotary(config, torch.device("cpu"))


def test_rope_that_cannot_be_read_is_refused(write_gguf, tiny_llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(), fields={"rope.scaling.type": "longrope"})
    with pytest.raises(ModelError, match=r"a.gguf' scales its RoPE by 'longrope', .* load the model's safetensors"):
        find(str(path)).config()
    path = write_gguf(tmp_path / "b.gguf", tiny_llama(), extra={"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    with pytest.raises(WeightsError, match=r"b.gguf': RoPE's factors are 4 and 4, and its frequencies 8"):
        find(str(path)).config()


@pytest.mark.parametrize("extra", ["blk.0.attn_rot_embd.weight", "oddity"])
def test_a_tensor_without_a_place_is_named(write_gguf, tiny_llama, load, tmp_path: Path, extra: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra={extra: np.ones(4, dtype=np.float32)})
    with pytest.raises(
        WeightsError, match=f"{re.escape(str(path))}' holds tensor '{extra}', for which the model has no"
    ):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.6, 0.999999])
def test_truncated_files(write_gguf, tiny_llama, load, tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "cut.gguf", tiny_llama())
    with path.open("r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}' is truncated"):
        load(path)


def test_something_else_under_that_name(load, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("This is no model. " * 100)
    with pytest.raises(WeightsError, match=r"text.gguf' is truncated or is no GGUF file"):
        load(path)
