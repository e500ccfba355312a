"""``adapters.loftq``: algorithm 1 against bitsandbytes and PEFT's decomposition; files; what it gives on SmolLM2."""

import json
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jebi.adapters.loftq import SHIFT_FILE
from jebi.adapters.lora import attach, detach
from jebi.adapters.peft_config import CONFIG_FILE, WEIGHTS_FILE
from jebi.adapters.peft_files import adapter_tensors, read_weights
from jebi.config import LoraConfig
from jebi.errors import AdapterError, ConfigError
from jebi.fast import FastLanguageModel

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def loftq(rounds: int, **settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "loftq_config": {"loftq_iter": rounds}} | settings)


def started(load, folder: Path, config: LoraConfig):
    model = load(folder, load_in_4bit=True)
    attach(model, config)
    return model


def nf4(weight: Tensor) -> Tensor:
    """Quantised and back by bitsandbytes, which on a CPU is right where rows are whole blocks."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return bitsandbytes.functional.dequantize_4bit(packed, state)


def algorithm_1(weight: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """PEFT's ``loftq_init``, which itself runs on cards alone: the base, and the product of the adapter."""
    low_rank = torch.zeros_like(weight)
    for _ in range(rounds):
        base = nf4(weight - low_rank)
        parts = _low_rank_decomposition(weight - base, rank)
        low_rank = parts["L"] @ parts["R"]
    return base, low_rank


@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("alpha", [4, 6])
@torch.no_grad()
def test_base_and_adapter_are_algorithm_1s(tiny_llama, load, rounds: int, alpha: float) -> None:
    model = started(load, tiny_llama("even"), loftq(rounds, lora_alpha=alpha))
    weights = load_file(tiny_llama("even") / "model.safetensors")
    for path, linear in model.linears():
        if linear.lora is None:
            continue
        base, low_rank = algorithm_1(weights[f"{path}.weight"], 4, rounds)
        product = alpha / 4 * linear.lora.B_Nr @ linear.lora.A_rK
        # A decomposition's last digit may move a block's 8-bit scale by one step, which is 1/127 of it at most.
        assert (linear.dense() - base).norm() <= (0 if rounds == 1 else 1 / 127) * base.norm()
        assert (product - low_rank).norm() <= (1e-4 if rounds == 1 else 5e-2) * low_rank.norm()


@torch.no_grad()
def test_more_rounds_come_nearer_to_the_original(tiny_llama, load) -> None:
    weights = load_file(tiny_llama() / "model.safetensors")

    def miss(model) -> float:
        total = 0.0
        for path, linear in model.linears():
            if path != "lm_head":
                near = linear.dense()
                near = near if linear.lora is None else near + linear.lora.scale * linear.lora.B_Nr @ linear.lora.A_rK
                total += (weights[f"{path}.weight"] - near).square().sum().item()
        return total

    four_bits, one, five = (
        miss(model)
        for model in (
            load(tiny_llama(), load_in_4bit=True),
            started(load, tiny_llama(), loftq(1)),
            started(load, tiny_llama(), loftq(5)),
        )
    )
    assert five < 0.95 * one < 0.9 * four_bits


@torch.no_grad()
def test_one_round_is_a_plain_adapter_on_the_ordinary_base(tiny_llama, load, tmp_path: Path) -> None:
    model = started(load, tiny_llama("even"), loftq(1))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["init_lora_weights"] is True
    again = FastLanguageModel.put_adapter(load(tiny_llama("even"), load_in_4bit=True), tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.adapter.config == model.adapter.config
    base = AutoModelForCausalLM.from_pretrained(tiny_llama("even"), dtype=torch.float32)
    for name, parameter in base.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.copy_(nf4(parameter))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)(IDS).logits
    # Of the largest logit: float32's roundings over two layers.
    assert (model(IDS).logits - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, load(tiny_llama("even"), load_in_4bit=True)(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_several_rounds_bring_their_base_along(tiny_llama, load, tmp_path: Path, caplog, dtype: torch.dtype) -> None:
    model = load(tiny_llama(), dtype, load_in_4bit=True)
    attach(model, loftq(3, use_dora=True))
    for tensor in adapter_tensors(model).values():
        tensor.add_(0.01)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert f"makes it again from {SHIFT_FILE}" in caplog.text
    assert SHIFT_FILE in {path.name for path in tmp_path.iterdir()}

    again = FastLanguageModel.put_adapter(load(tiny_llama(), dtype, load_in_4bit=True), tmp_path)
    assert torch.equal(again(IDS).logits, expected)
    # A resumed training has made the base already; what it holds is kept.
    weight = again.model.layers[0].mlp.up_proj.weight
    read_weights(again, tmp_path)
    assert again.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(again(IDS).logits, expected)

    again.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / SHIFT_FILE).read_bytes() == (tmp_path / SHIFT_FILE).read_bytes()
    detach(again)
    assert torch.equal(again(IDS).logits, load(tiny_llama(), dtype, load_in_4bit=True)(IDS).logits)
    attach(again, LoraConfig())
    again.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "copy"}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@torch.no_grad()
def test_peft_takes_the_changed_base(tiny_llama, load, tmp_path: Path) -> None:
    ours = started(load, tiny_llama("even"), loftq(3, modules_to_save=["lm_head"], bias="all"))
    for tensor in adapter_tensors(ours).values():
        tensor.add_(0.05)
    ours.save_pretrained(tmp_path / "adapter")
    ours.save_base(tmp_path / "base")
    base, report = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", output_loading_info=True)
    assert not any(report.values()), report
    # In evaluation bitsandbytes would multiply in bfloat16 on a CPU that can; there is no dropout.
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").train()(IDS).logits
    # Of the largest logit: float32's roundings over two layers.
    assert (ours(IDS).logits - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@torch.no_grad()
def test_switched_off_the_part_taken_out_of_the_base_is_put_back(tiny_llama, load) -> None:
    """The base alone lacks what the adapter was to hold; with it, it is as near to the original as 4 bits come."""
    exact = load(tiny_llama())(IDS).logits
    model = started(load, tiny_llama(), loftq(3))
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert trained == len(adapter_tensors(model)) == 28
    fresh = model(IDS).logits
    for tensor in adapter_tensors(model).values():
        tensor.add_(0.3)
    tuned = model(IDS).logits
    for _ in range(2):
        with model.disable_adapter():
            off = model(IDS).logits
            assert (off - exact).norm() < 1.1 * (load(tiny_llama(), load_in_4bit=True)(IDS).logits - exact).norm()
            assert not torch.equal(off, fresh)
        torch.testing.assert_close(model(IDS).logits, tuned)
        FastLanguageModel.for_inference(model)


def test_what_it_needs(tiny_llama, load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LoftQ corrects what 4 bits lose: load the model with load_in_4bit=True"):
        attach(load(tiny_llama()), loftq(1))
    load(tiny_llama(), load_in_4bit=True).save_pretrained(tmp_path)  # in bitsandbytes' format
    model = load(tmp_path, load_in_4bit=True)
    with pytest.raises(ConfigError, match="this model's checkpoint came quantised: load the original"):
        attach(model, loftq(1))
    assert model.adapter is None
    with pytest.raises(ConfigError, match=r"r=33 exceeds the rank of 'model.layers.0.self_attn.k_proj', which is 32"):
        started(load, tiny_llama(), loftq(1, r=33))
    with pytest.raises(ConfigError, match="loftq_bits must be 4, not 2"):
        LoraConfig(loftq_config={"loftq_bits": 2})


def test_a_folder_that_does_not_fit(tiny_llama, load, tmp_path: Path) -> None:
    for rounds in (1, 2):
        started(load, tiny_llama(), loftq(rounds)).save_pretrained(tmp_path / str(rounds))
        with pytest.raises(AdapterError, match="corrects what 4 bits lose: load its base with load_in_4bit=True"):
            FastLanguageModel.put_adapter(load(tiny_llama()), tmp_path / str(rounds))
    started(load, tiny_llama(), loftq(2, target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SHIFT_FILE).replace(tmp_path / "2" / SHIFT_FILE)
    model = load(tiny_llama(), load_in_4bit=True)
    with pytest.raises(AdapterError, match="was made for another model: it names other projections"):
        FastLanguageModel.put_adapter(model, tmp_path / "2")
    assert model.adapter is None
    with pytest.raises(AdapterError, match=rf"{SHIFT_FILE}' is missing or broken"):
        FastLanguageModel.put_adapter(model, tmp_path / "other")


def test_settings_as_scripts_write_them(tiny_llama) -> None:
    for settings in (
        {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=4, loftq_iter=2)},
        {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}},
        {"loftq_config": {"loftq_iter": 2}},
    ):
        model, _ = FastLanguageModel.from_pretrained(str(tiny_llama("worded")), 128, torch.float32, device="cpu")
        FastLanguageModel.get_peft_model(model, **settings)
        assert model.adapter.config.loftq_config == {"loftq_bits": 4, "loftq_iter": 2}


def test_smollm2_starts_nearer_to_16_bits() -> None:
    """Held-out loss before any training; on all the rows, with five rounds everywhere: docs/log.md."""
    from jebi.data.formats import FORMATS, read_row
    from jebi.data.heldout import answer_rows, summed_loss
    from jebi.data.passes import collate
    from jebi.data.sources import load_rows
    from jebi.data.templates import named

    table = load_rows(str(Path(__file__).parents[2] / "examples" / "data" / "heldout.jsonl"))
    rows = [read_row(FORMATS["alpaca"], row, number, {}) for number, row in enumerate(list(table)[:6])]

    def load(load_in_4bit: bool):
        return FastLanguageModel.from_pretrained(
            max_seq_length=512, dtype=torch.float32, load_in_4bit=load_in_4bit, device="cpu"
        )

    def loss(model, tokenizer) -> float:
        total, learnt = summed_loss(
            model, [collate(answer_rows(rows, named("tutorial", tokenizer), tokenizer, 512))], 4096
        )
        return total / learnt

    whole = loss(*load(False))
    model, tokenizer = load(True)
    losses = [loss(model, tokenizer)]
    # Five rounds where they are quick: the small projections.
    for config in (loftq(1, r=16, lora_alpha=16), loftq(5, r=16, lora_alpha=16, target_modules=["k_proj", "v_proj"])):
        attach(model, config)
        losses.append(loss(model, tokenizer))
        detach(model)
    four_bits, one, five = losses
    print(f"16-bit {whole:.4f}, 4-bit {four_bits:.4f}, one round {one:.4f}, five in keys and values {five:.4f}")
    assert whole < one < four_bits
    assert whole < five < four_bits
    assert loss(model, tokenizer) == four_bits
