"""``models.writing``: what jebi writes, transformers and jebi read back to the same logits."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from jebi.errors import ConfigError, ModelError
from jebi.models import writing

IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", ["tied", "untied", "biased", "llama3"])
@torch.no_grad()
def test_round_trip(tiny_llama, load, tmp_path: Path, variant: str, sharded: bool) -> None:
    model = load(tiny_llama(variant))
    model.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "5GB")
    names = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in names) == sharded
    assert sum(name.endswith(".safetensors") for name in names) == (1 if not sharded else len(names) - 3)
    assert not any(name.endswith(".partial") for name in names)
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)

    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    original = AutoModelForCausalLM.from_pretrained(tiny_llama(variant), dtype=torch.float32)
    assert torch.equal(theirs(IDS).logits, original(IDS).logits)
    assert theirs.config.to_dict() | {"_name_or_path": ""} == original.config.to_dict() | {"_name_or_path": ""}


@torch.no_grad()
def test_shards_of_transformers_are_read(tiny_llama, load, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama("untied"), dtype=torch.float32)
    theirs.save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(tmp_path)(IDS).logits, load(tiny_llama("untied"))(IDS).logits)


def test_an_index_names_every_tensor_once(tiny_llama, load, tmp_path: Path) -> None:
    model = load(tiny_llama("tied"))
    model.save_pretrained(tmp_path, max_shard_size=200_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in index["weight_map"]


def test_bfloat16_stays_bfloat16(tiny_llama, load, tmp_path: Path) -> None:
    load(tiny_llama(), torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
# bitsandbytes 0.50 decodes rows that are no multiple of a block wrongly on a CPU, hence even ones.
@pytest.mark.parametrize("variant", ["even", "even untied"])
@torch.no_grad()
def test_a_4_bit_model_is_written_as_bitsandbytes_writes_it(
    tiny_llama, load, tmp_path: Path, variant: str, sharded: bool
) -> None:
    model = load(tiny_llama(variant), load_in_4bit=True)
    model.save_pretrained(tmp_path, max_shard_size="30KB" if sharded else "5GB")
    assert not hasattr(model.config, "quantization_config")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    # In evaluation it would multiply in bfloat16 on a CPU that can; there is no dropout.
    expected = theirs.train()(IDS).logits
    # Equal weights, so what is left is the order of float32's sums.
    assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = load(tmp_path, load_in_4bit=True)
    for (name, one), (_, other) in zip(model.linears(), again.linears(), strict=True):
        if name != "lm_head":
            assert one.weight.dtype == other.weight.dtype
            for (part, buffer), (_, read) in zip(one.weight.named_buffers(), other.weight.named_buffers(), strict=True):
                assert torch.equal(buffer, read), f"{name} {part}"
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_an_8_bit_model_is_not_written(tiny_llama, load, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"held in 8 bits is not saved.* load_in_4bit=False .* load_in_4bit=True"):
        load(tiny_llama(), load_in_8bit=True).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 2])
def test_weights_that_cannot_be_written_leave_nothing(
    tiny_llama, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole, calls = writing.save_file, []

    def fail(tensors: dict[str, torch.Tensor], path: Path, **settings: object) -> None:
        calls.append(path)
        if len(calls) < at:
            return whole(tensors, path, **settings)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        load(tiny_llama()).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(calls) == at
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_checkpoint(
    tiny_llama, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_llama())
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(writing, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_division_into_files_replaces_the_earlier_one(tiny_llama, load, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"someone else's")
    for size, files in (("5GB", 1), ("200KB", 3), ("150KB", 4), ("5GB", 1)):
        # Read from where it is written to: the weights are mapped files, which must outlive their names.
        source = tmp_path if (tmp_path / "config.json").exists() else tiny_llama()
        load(source).save_pretrained(tmp_path, max_shard_size=size)
        assert len(list(tmp_path.glob("model*.safetensors"))) == files
        assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(load(tmp_path)(IDS).logits, load(tiny_llama())(IDS).logits)


def test_what_is_no_size_is_refused_and_nothing_written(tiny_llama, load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_shard_size 'large' is no size: give bytes, or a text such as '2GB'"):
        load(tiny_llama()).save_pretrained(tmp_path, max_shard_size="large")
    assert list(tmp_path.iterdir()) == []
