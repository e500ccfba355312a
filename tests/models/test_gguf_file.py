"""``models.gguf_file``: SmolLM2's file read as transformers reads it, small files of other forms, and broken ones."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from jebi.errors import ModelError, WeightsError
from jebi.models.files import embedded_file, find
from jebi.models.gguf_file import GgufFile

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


def write_gguf(
    path: Path, folder: Path, architecture: str = "llama", without: str = "", kind: str = "F32", extra: str = ""
) -> Path:
    """The tiny Llama of ``folder`` as llama.cpp's converter lays it out, without tokens."""
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
    }
    for name, value in fields.items():
        if name != without:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            # llama.cpp's conversion/llama.py, `permute`: the two halves of a head side by side.
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2:
            quantised = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
            writer.add_tensor(named(names, name), quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(named(names, name), values)
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return found


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_rows_of_q_and_k_come_back_in_order(tiny_llama, load, tmp_path: Path, variant: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(variant))
    stored = {tensor.name: tensor.read() for tensor in GgufFile(path).tensors()}
    original = load_file(tiny_llama(variant) / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in original.items())
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(path)(ids).logits, load(tiny_llama(variant))(ids).logits)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_other_block_types(tiny_llama, tmp_path: Path, kind: str) -> None:
    original = load_file(tiny_llama("even") / "model.safetensors")
    # Half a step: 2**-11 of a value in float16; in Q8_0 a 254th of a block's largest, its scale rounded to float16.
    relative = {"F16": 2**-11, "Q8_0": 1 / 254 + 2**-11}[kind]
    for stored in GgufFile(write_gguf(tmp_path / "tiny.gguf", tiny_llama("even"), kind=kind)).tensors():
        exact = original[stored.name]
        assert (stored.read() - exact).abs().max() <= relative * exact.abs().max(), stored.name


def test_other_architectures_are_refused_by_name(tiny_llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="qwen2")
    with pytest.raises(ModelError, match=r"'other.gguf' holds architecture 'qwen2'. Supported in GGUF files: llama"):
        find(str(path)).config()


def test_a_missing_header_field_is_named(tiny_llama, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), without="block_count")
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))}' lacks the header field 'llama.block_count'"):
        find(str(path)).config()


def test_scaled_rope_is_refused_before_any_weight_is_read(tiny_llama, load, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra="rope_freqs.weight")
    with pytest.raises(ModelError, match=r"tiny\.gguf' scales its RoPE .* load the model's safetensors checkpoint"):
        load(path)


@pytest.mark.parametrize("extra", ["blk.0.attn_q_norm.weight", "oddity"])
def test_a_tensor_without_a_place_is_named(tiny_llama, load, tmp_path: Path, extra: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=extra)
    with pytest.raises(
        WeightsError, match=f"{re.escape(str(path))}' holds tensor '{extra}', for which the model has no"
    ):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.02, 0.6, 0.999999])
def test_truncated_files(tiny_llama, load, tmp_path: Path, share: float) -> None:
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
