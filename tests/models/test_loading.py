"""``models.loading``: 4-bit weights are bitsandbytes' to the byte, logits transformers', memory one tensor's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from jebi.errors import OutOfMemoryError
from jebi.models import loading
from jebi.models.families import read_config
from jebi.quant.nf4 import NF4Weight

IDS = torch.randint(3, 300, (2, 30), generator=torch.Generator().manual_seed(0))


def assert_bytes_of_bitsandbytes(model, originals: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Every projection is stored as bitsandbytes stores the same tensor; everything else in the compute dtype."""
    for path, linear in model.linears():
        if path == "lm_head":
            assert isinstance(linear.weight, torch.nn.Parameter)
            continue
        assert isinstance(linear.weight, NF4Weight), path
        packed, state = bitsandbytes.functional.quantize_4bit(
            originals.pop(f"{path}.weight").to(dtype), quant_type="nf4", compress_statistics=True, blocksize=64
        )
        assert torch.equal(linear.weight.packed, packed.view(-1)), path
        assert torch.equal(linear.weight.absmax, state.absmax), path
        assert torch.equal(linear.weight.nested_absmax, state.state2.absmax), path
        assert torch.equal(linear.weight.offset, state.offset), path
    for name, tensor in originals.items():
        assert torch.equal(model.get_parameter(name), tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["tied", "untied", "biased"])
def test_4_bit_weights_are_those_of_bitsandbytes(tiny_llama, load, variant: str, dtype: torch.dtype) -> None:
    folder = tiny_llama(variant)
    model = load(folder, dtype, load_in_4bit=True)
    assert_bytes_of_bitsandbytes(model, load_file(folder / "model.safetensors"), dtype)


def test_smollm2_in_4_bits(smollm2_folder: Path, load) -> None:
    originals = load_file(smollm2_folder / "model.safetensors")
    assert_bytes_of_bitsandbytes(load(smollm2_folder, load_in_4bit=True), originals, torch.float32)


@torch.no_grad()
def test_4_bit_logits_are_those_of_transformers(tiny_llama, load) -> None:
    ours = load(tiny_llama("even"), load_in_4bit=True)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama("even"), dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    # In evaluation it would multiply in bfloat16 on a CPU that can; there is no dropout.
    theirs.train()
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    logits, expected = ours(IDS).logits, theirs(IDS).logits
    # Of the largest logit: equal weights, so float32's roundings over two layers; 4 bits themselves cost a tenth.
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (expected - load(tiny_llama("even"))(IDS).logits).abs().max() > 1e-2 * expected.abs().max()


def test_dtypes(tiny_llama, load) -> None:
    model = load(tiny_llama("biased"), torch.bfloat16, load_in_4bit=True)
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_a_checkpoint(tiny_llama, load, tmp_path: Path, dtype: torch.dtype) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_llama("biased"), dtype=dtype).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for held in (torch.float32, torch.bfloat16):
        model = load(tmp_path, held)
        assert all(torch.equal(model.get_parameter(name), tensor.to(held)) for name, tensor in stored.items())


def test_counts_of_a_4_bit_model_are_of_values_not_bytes(tiny_llama, load) -> None:
    expected = sum(tensor.numel() for tensor in load_file(tiny_llama() / "model.safetensors").values())
    assert load(tiny_llama(), load_in_4bit=True).trainable_parameters() == (0, expected)
    assert load(tiny_llama(), load_in_8bit=True).trainable_parameters() == (0, expected)
    assert load(tiny_llama()).trainable_parameters() == (0, expected)


LAYERS, WIDTH, FFN = 6, 768, 2048
LARGEST = 4 * WIDTH * FFN

PROBE = """
import sys, threading, time
from pathlib import Path
import torch
from jebi.models.files import find
from jebi.models.loading import load_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.001)

files = find(sys.argv[1])
config = files.config()
done, seen = False, []
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load_model(files, config, torch.float32, torch.device("cpu"), "nf4")
done = True
thread.join()
print(before, max(seen), anonymous(), len(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from Linux's /proc")
def test_loading_holds_one_tensor_beside_the_model(tmp_path: Path) -> None:
    write_synthetic(tmp_path)
    before, peak, final = probe(tmp_path)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    bound = 2 * LARGEST + SLACK
    assert peak - final < bound
    # The bound would mean nothing if the checkpoint were as small, or the model not in 4 bits.
    assert stored > 4 * bound
    assert final - before < stored / 4


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["fp8", "bitsandbytes"])
def test_so_it_does_from_a_quantised_checkpoint(tmp_path: Path, load, kind: str) -> None:
    write_synthetic(tmp_path / "plain")
    if kind == "bitsandbytes":
        load(tmp_path / "plain", load_in_4bit=True).save_pretrained(tmp_path / kind)
    else:
        as_fp8(tmp_path / "plain", tmp_path / kind)
    before, peak, final = probe(tmp_path / kind, 20)  # there is less to do, so less time to look
    # 4-bit bytes stay where the file is mapped; float8 is made dense, one matrix at a time, before it is quantised.
    assert peak - final < SLACK + (0 if kind == "bitsandbytes" else 2 * LARGEST)
    dense = LAYERS * LARGEST * 3
    assert final - before < dense / 4
    assert dense > 4 * (2 * LARGEST + SLACK)


SLACK = 6 * 2**20
"""Quantisation's cache-sized buffers, and code pages that its first call touches."""


def as_fp8(source: Path, target: Path) -> None:
    """The checkpoint with one scale a row and one byte a number, as fbgemm has it."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            if name.endswith("_proj.weight"):
                scale = tensor.abs().amax(1, keepdim=True).clamp(min=1e-6) / 448
                tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
                tensors[name.removesuffix("weight") + "weight_scale"] = scale
            else:
                tensors[name] = tensor
        save_file(tensors, file)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fbgemm_fp8"}}))


def probe(folder: Path, samples_at_least: int = 50) -> tuple[int, int, int]:
    """Load ``folder`` as NF4 in a process of its own: its anonymous memory in bytes before, at its peak, and after."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        # So that memory given back goes back to the system at once, and what is seen is what the loader holds.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    before, peak, final, samples = map(int, result.stdout.split())
    assert samples > samples_at_least
    return before, peak, final


def write_synthetic(folder: Path) -> None:
    """A checkpoint of a few large layers and a small vocabulary, in two files."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    layer = read_config(config).layer
    inner, kv_inner = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    shapes = {"model.embed_tokens.weight": (128, WIDTH), "model.norm.weight": (WIDTH,)}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (WIDTH,),
            f"{prefix}.post_attention_layernorm.weight": (WIDTH,),
            f"{prefix}.self_attn.q_proj.weight": (inner, WIDTH),
            f"{prefix}.self_attn.k_proj.weight": (kv_inner, WIDTH),
            f"{prefix}.self_attn.v_proj.weight": (kv_inner, WIDTH),
            f"{prefix}.self_attn.o_proj.weight": (WIDTH, inner),
            f"{prefix}.mlp.gate_proj.weight": (FFN, WIDTH),
            f"{prefix}.mlp.up_proj.weight": (FFN, WIDTH),
            f"{prefix}.mlp.down_proj.weight": (WIDTH, FFN),
        }
    values = torch.linspace(-1, 1, WIDTH * FFN)
    names = sorted(shapes)
    places = {}
    for file, held in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({n: values[: torch.Size(shapes[n]).numel()].view(shapes[n]).clone() for n in held}, folder / file)
        places |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_memory_that_runs_out_on_the_way_is_no_fault_of_the_file(
    tiny_llama, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(NF4Weight, "quantize", no_room)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out while 'model\..*' was loaded: set load_in_4bit"):
        load(tiny_llama("tied"), load_in_4bit=True)


def test_memory_is_reserved_in_pages_before_anything_is_loaded(
    tiny_llama, load, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(loading, "reserve_in_pages", asked.append)
    load(tiny_llama("tied"), torch.float32)
    assert asked == [torch.device("cpu")]
