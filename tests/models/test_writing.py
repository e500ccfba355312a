"""``models.writing``: what jebi writes, transformers and jebi read back to the same logits."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jebi.errors import ModelError
from jebi.models import writing

IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("variant", ["tied", "untied", "biased", "llama3"])
@torch.no_grad()
def test_round_trip(
    tiny_llama, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, sharded: bool
) -> None:
    if sharded:
        monkeypatch.setattr(writing, "_SHARD_SIZE", "200KB")
    model = load(tiny_llama(variant))
    model.save_pretrained(tmp_path)
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


def test_an_index_names_every_tensor_once(tiny_llama, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_SIZE", "200KB")
    model = load(tiny_llama("tied"))
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in index["weight_map"]


def test_bfloat16_stays_bfloat16(tiny_llama, load, tmp_path: Path) -> None:
    load(tiny_llama(), torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_4_bit_base_is_not_written(tiny_llama, load, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="keep its original checkpoint, or load with load_in_4bit=False"):
        load(tiny_llama(), load_in_4bit=True).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_nothing_half(
    tiny_llama, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        load(tiny_llama()).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()
