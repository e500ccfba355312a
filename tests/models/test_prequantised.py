"""``models.prequantised``: quantised checkpoints that transformers and bitsandbytes wrote, read as they read them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config

from jebi.errors import ModelError, WeightsError
from jebi.models.files import StoredTensor, find
from jebi.models.prequantised import SUPPORTED, joined, read_scheme
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))
UP = "model.layers.1.mlp.up_proj"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def bitsandbytes_folder(tiny_llama, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``bitsandbytes_folder(dtype, **settings)``: the tiny checkpoint as transformers quantises and saves it."""
    made: dict[str, Path] = {}

    def folder_of(
        dtype: torch.dtype = torch.float32, shards: str = "5GB", variant: str = "even", **settings: object
    ) -> Path:
        key = f"{dtype} {shards} {variant} {settings}"
        if key not in made:
            chosen = BitsAndBytesConfig(**(settings or NF4))
            model = AutoModelForCausalLM.from_pretrained(
                tiny_llama(variant), dtype=dtype, quantization_config=chosen, device_map="cpu"
            )
            made[key] = tmp_path_factory.mktemp("bitsandbytes")
            model.save_pretrained(made[key], max_shard_size=shards)
        return made[key]

    return folder_of


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def theirs(folder: Path):
    """transformers' model; in evaluation it would multiply in bfloat16 on a CPU that can, and there is no dropout."""
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").train()


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_4_bit_weights_are_read_and_written_as_they_are(
    bitsandbytes_folder, load, tmp_path: Path, dtype: torch.dtype, double: bool
) -> None:
    folder = bitsandbytes_folder(dtype, **NF4 | {"bnb_4bit_use_double_quant": double})
    stored = stored_tensors(folder)
    model = load(folder, dtype, load_in_4bit=True)
    for name, linear in model.linears():
        if name != "lm_head":
            assert isinstance(linear.weight, NF4Weight), name
            assert linear.weight.absmax.dtype == (torch.uint8 if double else torch.float32)
            # In the dtype it had before, bitsandbytes rounds to the same numbers.
            expected = bitsandbytes.nn.Params4bit.from_prequantized(
                data=stored[f"{name}.weight"],
                quantized_stats={n: t for n, t in stored.items() if n.startswith(f"{name}.weight.")},
                device="cpu",
            )
            dense = bitsandbytes.functional.dequantize_4bit(expected.data, expected.quant_state)
            assert torch.equal(linear.dense(), dense), name
    model.save_pretrained(tmp_path)
    written = stored_tensors(tmp_path)
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    again = load(tmp_path, dtype, load_in_4bit=True)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert "quantization_config" not in again.config.to_dict()
    if dtype == torch.float32:
        # Equal weights, so what is left is the order of float32's sums.
        for other in (folder, tmp_path):
            expected_logits = theirs(other)(IDS).logits
            assert (model(IDS).logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()


@torch.no_grad()
def test_4_bit_weights_held_otherwise(bitsandbytes_folder, load) -> None:
    folder = bitsandbytes_folder()
    four, dense = load(folder, load_in_4bit=True), load(folder)
    for (name, one), (_, other) in zip(four.linears(), dense.linears(), strict=True):
        assert isinstance(other.weight, torch.nn.Parameter), name
        assert torch.equal(one.dense(), other.weight), name
    assert torch.equal(four(IDS).logits, dense(IDS).logits)
    eight = load(folder, load_in_8bit=True).get_submodule(UP).weight
    assert isinstance(eight, Int8Weight)
    assert torch.equal(eight.codes, Int8Weight.quantize(dense.get_submodule(UP).weight).codes)


@torch.no_grad()
def test_parts_of_a_weight_may_lie_in_several_files(bitsandbytes_folder, load) -> None:
    folder = bitsandbytes_folder(shards="2KB")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert places[f"{UP}.weight"] != places[f"{UP}.weight.quant_map"]
    model = load(folder, load_in_4bit=True)
    assert torch.equal(model(IDS).logits, load(bitsandbytes_folder(), load_in_4bit=True)(IDS).logits)


@torch.no_grad()
def test_bytes_under_another_storage_dtype(bitsandbytes_folder, load) -> None:
    folder = bitsandbytes_folder(torch.bfloat16, **NF4 | {"bnb_4bit_quant_storage": "bfloat16"})
    assert stored_tensors(folder)[f"{UP}.weight"].dtype == torch.bfloat16
    expected = load(bitsandbytes_folder(torch.bfloat16, **NF4), torch.bfloat16, load_in_4bit=True)
    assert torch.equal(load(folder, torch.bfloat16, load_in_4bit=True)(IDS).logits, expected(IDS).logits)


def test_projections_that_were_left_dense_stay_dense(bitsandbytes_folder, load, tmp_path: Path) -> None:
    folder = bitsandbytes_folder(**NF4, llm_int8_skip_modules=["lm_head", UP])
    model = load(folder, load_in_4bit=True)
    assert isinstance(model.get_submodule(UP).weight, torch.nn.Parameter)
    assert isinstance(model.get_submodule(UP.replace("1", "0")).weight, NF4Weight)
    model.save_pretrained(tmp_path)
    assert isinstance(theirs(tmp_path).get_submodule(UP), torch.nn.Linear)
    assert torch.equal(stored_tensors(tmp_path)[f"{UP}.weight"], stored_tensors(folder)[f"{UP}.weight"])


@torch.no_grad()
def test_a_head_in_4_bits_is_made_dense(bitsandbytes_folder, load) -> None:
    folder = bitsandbytes_folder(variant="even untied", **NF4, llm_int8_skip_modules=["none"])
    assert f"lm_head.{STATE}" in stored_tensors(folder)
    model = load(folder, load_in_4bit=True)
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)
    expected = theirs(folder)(IDS).logits
    # Equal weights, so what is left is the order of float32's sums.
    assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_llm_int8(bitsandbytes_folder, load) -> None:
    folder = bitsandbytes_folder(torch.float16, load_in_8bit=True)
    stored = stored_tensors(folder)
    assert stored[f"{UP}.weight"].dtype == torch.int8
    model = load(folder)
    for name, linear in model.linears():
        if name != "lm_head":
            expected = bitsandbytes.functional.int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
            assert torch.equal(linear.weight, expected), name
    four = load(folder, torch.bfloat16, load_in_4bit=True).get_submodule(UP).weight
    assert torch.equal(four.packed, NF4Weight.quantize(model.get_submodule(UP).weight.bfloat16()).packed)


def quantised(
    source: Path, target: Path, settings: dict[str, object], split: Callable[[Tensor], dict[str, Tensor]]
) -> Path:
    """The checkpoint ``source`` with the layers' projections replaced by what ``split`` makes of each."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        parts = split(tensor) if module.endswith("_proj") and leaf == "weight" else {leaf: tensor}
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return target


def in_blocks(weight: Tensor, high: int = 32, wide: int = 16) -> dict[str, Tensor]:
    """float8 with one scale a block; the last blocks may be cut off."""
    rows, columns = weight.shape
    grid = (-(-rows // high), -(-columns // wide))
    scale = torch.empty(grid)
    numbers = torch.empty(rows, columns, dtype=FP8)
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            scale[i, j] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / scale[i, j]).to(FP8)
    return {"weight": numbers, "weight_scale_inv": scale}


def test_fp8_in_blocks(tiny_llama, load, tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}
    folder = quantised(tiny_llama("even"), tmp_path, settings, in_blocks)
    expected = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True, **settings)
    )
    model, original = load(folder), load(tiny_llama("even"))
    for name, linear in model.linears():
        assert torch.equal(linear.weight, expected.get_submodule(name).weight), name
        # A float8 number has 3 bits after the first: half a step of the largest.
        assert (linear.weight - original.get_submodule(name).weight).abs().max() <= 2**-4 * linear.weight.abs().max()
    four = load(folder, load_in_4bit=True).get_submodule(UP).weight
    assert torch.equal(four.packed, NF4Weight.quantize(model.get_submodule(UP).weight).packed)


def one(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(FP8), "weight_scale_inv": scale, "activation_scale": torch.ones(())}


def by_rows(weight: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).to(dtype)
    extra = {"input_scale": torch.ones(1), "output_scale": torch.ones(1)}
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale} | extra


def compressed(form: str = "float-quantized", **weights: object) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def renamed(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": parts["weight"], "weight_scale": torch.atleast_1d(parts["weight_scale_inv"])}


KINDS = {
    "fp8, last blocks cut off": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        lambda weight: in_blocks(weight, 128, 128),
        (128, 128),
    ),
    "fp8, one scale": ({"quant_method": "fp8", "weight_block_size": None}, one, None),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, by_rows, None),
    "compressed, a scale a row": (
        compressed(strategy="channel"),
        lambda weight: by_rows(weight, torch.bfloat16),
        None,
    ),
    "compressed, one scale": (compressed(strategy="tensor"), lambda weight: renamed(one(weight)), None),
    "compressed, in blocks": (
        compressed(strategy="block", block_structure=[32, 16]),
        lambda weight: renamed(in_blocks(weight)),
        (32, 16),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_8_bit_kinds(tiny_llama, load, tmp_path: Path, kind: str) -> None:
    settings, split, block = KINDS[kind]
    model = load(quantised(tiny_llama("biased"), tmp_path, settings, split))
    for name, tensor in load_file(tiny_llama("biased") / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(model.get_parameter(name), tensor), name
            continue
        parts = split(tensor)
        scale = (parts["weight_scale"] if "weight_scale" in parts else parts["weight_scale_inv"]).float()
        if block:
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            scale = scale[: tensor.shape[0], : tensor.shape[1]]
        assert torch.equal(model.get_parameter(name), parts["weight"].float() * scale), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, r"4-bit \(fp4\)"),
        ({"load_in_4bit": True}, r"4-bit \(fp4\)"),
        (compressed("pack-quantized"), "compressed-tensors in format 'pack-quantized'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_refused_before_any_weight(
    tiny_llama, load, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    folder = quantised(tiny_llama(), tmp_path, settings, lambda weight: {"weight": weight})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"quantised with .*{named}, .* reads bitsandbytes 4-bit.* unquantised check"):
        load(folder, load_in_4bit=True)
    assert SUPPORTED.startswith("bitsandbytes 4-bit (nf4), ")


def damaged(folder: Path, target: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = stored_tensors(folder)
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("settings", "edit", "message"),
    [
        (NF4, lambda t: t.pop(f"{UP}.weight.absmax"), "weight.absmax is missing"),
        (NF4, lambda t: t.pop(f"{UP}.{STATE}"), f"{STATE} is missing"),
        (NF4, lambda t: t[f"{UP}.{STATE}"].fill_(0), "the file is damaged"),
        (NF4, lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:9]}), "stored bytes are of another size"),
        ({"load_in_8bit": True}, lambda t: t.pop(f"{UP}.SCB"), "its scale 'SCB' is missing"),
        ({"load_in_8bit": True}, lambda t: t[f"{UP}.weight_format"].fill_(2), "not in rows"),
        ({"load_in_8bit": True}, lambda t: t.update({f"{UP}.SCB": torch.ones(3)}), "192 rows, but scales for 3"),
    ],
)
def test_a_damaged_weight_is_named(bitsandbytes_folder, load, tmp_path: Path, settings, edit, message: str) -> None:
    folder = damaged(bitsandbytes_folder(torch.float16, **settings), tmp_path, edit)
    with pytest.raises(WeightsError, match=f"'{folder}/model.safetensors': tensor '{UP}.weight'.*{message}"):
        load(folder, load_in_4bit=True)


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_numbers_without_a_scale_are_no_weights(tiny_llama, load, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = quantised(tiny_llama(), tmp_path, {}, lambda weight: {"weight": weight.to(dtype)})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf"tensor 'model.layers.0.* it is of dtype {dtype}"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}}))
    with pytest.raises(WeightsError, match=rf"tensor 'model.layers.0.* it is of dtype {dtype}"):
        load(folder)


def test_a_part_without_its_weight_is_a_tensor_without_a_place(bitsandbytes_folder, load, tmp_path: Path) -> None:
    folder = damaged(bitsandbytes_folder(), tmp_path, lambda tensors: tensors.pop(f"{UP}.weight"))
    with pytest.raises(WeightsError, match=f"holds tensor '{UP}.weight.absmax', for which the model has no place"):
        load(folder, load_in_4bit=True)


def test_reading_is_left_to_the_loader(bitsandbytes_folder) -> None:
    files = find(str(bitsandbytes_folder()))
    scheme = read_scheme(files.config())
    assert scheme is not None
    read: list[str] = []

    def watched(stored: StoredTensor) -> StoredTensor:
        def read_it() -> Tensor:
            read.append(stored.name)
            return stored.read()

        return StoredTensor(stored.name, stored.shape, stored.file, read_it)

    found = {stored.name: stored for stored in joined(map(watched, files.tensors()), scheme)}
    assert {name.partition(".weight.")[2] for name in read} == {STATE.removeprefix("weight.")}
    assert found[f"{UP}.weight"].shape == (192, 64)
