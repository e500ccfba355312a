"""``models.placement``: wherever embedding and head are, the model computes, saves and trains as before.

There is no card here: `as_on_a_card` makes the model on the CPU take its places seriously. What needs one is
tests/nn/placement_on_card.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach, detach
from jebi.adapters.peft_files import adapter_tensors
from jebi.adapters.reference import reference_of
from jebi.config import LoraConfig, ModelConfig, Places
from jebi.errors import AdapterError, ConfigError, ModelError
from jebi.fast import FastLanguageModel
from jebi.models import loading, placement
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.placement import fitting, movable, place, placed, resolve
from jebi.nn import slices
from jebi.nn.host_weight import HostWeight
from jebi.quant.nf4 import NF4Weight

CPU, CARD = torch.device("cpu"), torch.device("cuda")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
OPEN, HOST = Places(), Places("host", "host")
Made = Callable[..., JebiForCausalLM]
variants = pytest.mark.parametrize("variant", ["tied", "untied"])


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory counts as another place than the model's, and slices are small."""
    for module in (loading, placement):
        monkeypatch.setattr(module, "resolve", lambda places, tied, device: resolve(places, tied, CARD))
    monkeypatch.setattr(slices, "SLICE_BYTES", 64 * 4 * 70)


@pytest.fixture
def made(tiny_llama: Callable[[str], Path]) -> Made:
    """``made(variant, places)``: the tiny model, loaded to those places."""

    def make(variant: str = "untied", places: Places = OPEN, folder: Path | None = None) -> JebiForCausalLM:
        files = find(str(folder or tiny_llama(variant)))
        return loading.load_model(files, files.config(), torch.float32, CPU, "dense", places)

    return make


def shaken(model: JebiForCausalLM) -> JebiForCausalLM:
    attach(model, LoraConfig(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.train()


def results(model: JebiForCausalLM, **keywords: Any) -> dict[str, Tensor]:
    """Loss and logits, the adapter's gradients by either."""
    found: dict[str, Tensor] = {}
    for kind in ("loss", "logits"):
        model.zero_grad()
        outputs = model(IDS, labels=IDS, return_logits=True, **keywords)
        value = outputs.loss if kind == "loss" else outputs.logits.square().mean()
        value.backward()
        found[kind] = getattr(outputs, kind).detach()
        found |= {f"{kind} {name}": tensor.grad.clone() for name, tensor in adapter_tensors(model).items()}
    return found


def assert_close(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, value in other.items():
        # Sums of the same float32 numbers in another order.
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("asked", "tied", "found"),
    [
        (Places(), False, Places("card", "card")),
        (Places(), True, Places("card", "card")),
        (Places("host"), False, Places("host", "card")),
        (Places("host"), True, Places("host", "host")),
        (Places("auto", "host"), False, Places("card", "host")),
        (Places("auto", "host"), True, Places("host", "host")),
        (Places("host", "host"), True, Places("host", "host")),
        (Places("host", "nf4"), True, Places("host", "nf4")),
        (Places("auto", "int8"), True, Places("card", "int8")),
    ],
)
def test_places_are_resolved(asked: Places, tied: bool, found: Places) -> None:
    assert resolve(asked, tied, CARD) == found
    quantised = found.head if found.head in ("nf4", "int8") else "card"
    assert resolve(asked, tied, CPU) == Places("card", quantised), "a CPU has no other place"


@pytest.mark.parametrize("places", [Places("host", "card"), Places("card", "host")], ids=str)
def test_one_table_is_not_put_in_two_places(made: Made, places: Places) -> None:
    with pytest.raises(ModelError, match=r"head is its embedding, one table, .* set one of them to 'auto'"):
        made("tied", places)


@variants
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("as_on_a_card")
def test_from_host_memory_the_model_computes_the_same(made: Made, variant: str, smoothing: float) -> None:
    model = shaken(made(variant))
    before, numbers = results(model, label_smoothing=smoothing), model.trainable_parameters()
    place(model, HOST)
    assert placed(model) == HOST
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (variant == "tied")
    assert model.device == CPU
    assert model.dtype == torch.float32
    assert model.trainable_parameters() == numbers
    assert not any(parameter.shape[0] == 300 for parameter in model.parameters())
    assert_close(results(model, label_smoothing=smoothing), before)
    place(model, Places())
    assert placed(model) == Places("card", "card")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (variant == "tied")
    again = results(model, label_smoothing=smoothing)
    assert all(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.usefixtures("as_on_a_card")
@variants
def test_loaded_to_host_memory_it_was_never_elsewhere(made: Made, monkeypatch, variant: str) -> None:
    moved: list[object] = []
    monkeypatch.setattr(placement, "_moved", lambda *args: moved.append(args))
    model = made(variant, HOST)
    assert placed(model) == model.places == HOST
    assert not moved
    assert torch.equal(model.model.embed_tokens.weight.weight_NK, made(variant).model.embed_tokens.weight)


@pytest.mark.usefixtures("as_on_a_card")
@variants
@torch.no_grad()
def test_it_generates_the_same(made: Made, variant: str) -> None:
    expected = made(variant).generate(IDS[:1], max_new_tokens=8, do_sample=False)
    for places in (HOST, Places("auto", "host")):
        model = made(variant, places)
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=8, do_sample=False), expected)


@variants
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_head_is_the_quantised_weight(made: Made, monkeypatch, variant: str, kind: str) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 64 * 4 * 70)
    model = shaken(made(variant, Places(head=kind)))
    assert placed(model) == Places("card", kind)
    assert not model.model.shape.tied
    dense = model.lm_head.dense()
    assert 0 < (dense - made(variant).lm_head.weight).abs().max() < 0.3
    twin = shaken(made(variant))
    assert model.trainable_parameters()[1] == twin.trainable_parameters()[1] + (variant == "tied") * 300 * 64
    assert (model.packed_values(), model.floating_point_ops({"input_ids": IDS})) == (
        0,
        twin.floating_point_ops({"input_ids": IDS}),
    )
    twin.lm_head.store(nn.Parameter(dense, requires_grad=False))
    assert_close(results(model), results(twin))
    FastLanguageModel.for_inference(model)
    assert model.lm_head.is_dense, "on a CPU with room it is kept dequantised"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin.eval()(IDS).logits)
    model.train()
    assert not model.lm_head.is_dense
    with pytest.raises(ModelError, match="its digits are gone; load the model again"):
        place(model, Places("auto", "card"))
    other = {"nf4": "int8", "int8": "nf4"}[kind]
    with pytest.raises(ModelError, match="quantised otherwise already"):
        place(model, Places("auto", other))


@variants
@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("places", [Places("host", "host"), Places("host", "nf4"), Places(head="int8")], ids=str)
@torch.no_grad()
def test_saved_models_are_read_by_transformers(made: Made, tmp_path: Path, variant: str, places: Places) -> None:
    """A quantised head is written dense: these numbers, in a place where every reader looks for them."""
    model = made(variant, places)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.dense())
    assert torch.equal(theirs.model.embed_tokens.weight, made(variant).model.embed_tokens.weight)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    model.save_base(tmp_path / "base")
    torch.testing.assert_close(made(folder=tmp_path / "base")(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_4_bit_model_with_a_4_bit_head_is_written_with_a_dense_one(tiny_llama, tmp_path: Path) -> None:
    model, _ = loaded(tiny_llama("untied"), head="nf4")
    model.save_pretrained(tmp_path)
    again, _ = loaded(tmp_path)
    assert isinstance(again.model.layers[0].self_attn.q_proj.weight, NF4Weight)
    assert torch.equal(again.lm_head.weight, model.lm_head.dense())


def loaded(folder: Path, **keywords: Any) -> tuple[JebiForCausalLM, None]:
    files = find(str(folder))
    config = ModelConfig(str(folder), **keywords)
    return loading.load_model(files, files.config(), torch.float32, CPU, config.storage, config.places), None


@variants
@pytest.mark.usefixtures("as_on_a_card")
def test_a_vocabulary_is_resized_where_it_lies(made: Made, tmp_path: Path, variant: str) -> None:
    plain, model = made(variant), made(variant, HOST)
    for one in (plain, model):
        one.resize_token_embeddings(310)
        shaken(one)
    assert placed(model) == HOST
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (variant == "tied")
    assert_close(results(model), results(plain))
    model.save_pretrained(tmp_path)
    for places in (OPEN, HOST):
        other = FastLanguageModel.put_adapter(made(variant, places), tmp_path)
        torch.testing.assert_close(other.eval()(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_quantised_head_keeps_its_vocabulary(made: Made, tmp_path: Path) -> None:
    model = made("untied", Places(head="nf4"))
    with pytest.raises(ModelError, match="a quantised head is not resized: load the model with head='card'"):
        model.resize_token_embeddings(310)
    other = made("untied")
    other.resize_token_embeddings(310)
    shaken(other).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="head='card'"):
        FastLanguageModel.put_adapter(model, tmp_path)
    assert model.model.embed_tokens.num_embeddings == 300


def test_an_adapter_with_a_head_of_its_own_needs_a_dense_one(made: Made, tmp_path: Path) -> None:
    other = made("untied")
    attach(other, LoraConfig(r=4, modules_to_save=["lm_head"]))
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="a quantised head head='card'"):
        FastLanguageModel.put_adapter(made("untied", Places(head="nf4")), tmp_path)
    other = made("untied")
    other.model.loaded_vocabulary = 0  # so that the tables are written
    shaken(other).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="brings a head, and the model's is quantised: load it with head='card'"):
        FastLanguageModel.put_adapter(made("untied", Places(head="nf4")), tmp_path)


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@variants
def test_what_is_trained_is_on_the_card(made: Made, variant: str, module: str) -> None:
    asked = made(variant, HOST)
    with pytest.raises(
        ConfigError, match=f"{module}' lies in host memory, .* without embedding='host' and head='host'"
    ):
        attach(asked, LoraConfig(r=4, modules_to_save=[module]))
    moved = made(variant)
    place(moved, HOST)  # by an earlier training's plan
    attach(moved, LoraConfig(r=4, modules_to_save=[module]))
    assert placed(moved) == Places("card", "card")
    places = movable(moved)
    free = {
        "tied": Places("card", "card"),
        "untied": Places(*(("card", "auto") if module == "embed_tokens" else ("auto", "card"))),
    }
    assert places == free[variant]
    detach(moved)
    assert movable(moved) == Places()


def test_full_finetuning_leaves_them_on_the_card() -> None:
    for places in ({"embedding": "host"}, {"head": "host"}, {"head": "nf4"}):
        with pytest.raises(ConfigError, match="full_finetuning trains embedding and head, on the card"):
            ModelConfig(full_finetuning=True, **places)
    assert ModelConfig(full_finetuning=True, embedding="card", head="card").places == Places("card", "card")


@pytest.mark.usefixtures("as_on_a_card")
def test_masters_are_not_moved(tiny_llama) -> None:
    files = find(str(tiny_llama("untied")))
    model = loading.load_model(files, files.config(), torch.float32, CPU, "masters")
    for places in (Places("host"), Places(head="host"), Places(head="nf4")):
        with pytest.raises(ModelError, match="trained"):
            place(model, places)
    assert placed(model) == Places("card", "card")
    assert movable(model) == Places("card", "card")


@pytest.mark.usefixtures("as_on_a_card")
def test_twins_share_the_table(made: Made) -> None:
    model = shaken(made("untied", HOST))
    twin = reference_of(model)
    assert twin.model.embed_tokens.weight.weight_NK is model.model.embed_tokens.weight.weight_NK
    assert torch.equal(twin(IDS).logits, model.eval()(IDS).logits)
    scorer = FastLanguageModel.reward_model_of(model)
    assert placed(scorer) == Places("host", "card")
    assert scorer(IDS).logits.isfinite().all()
    assert scorer.device == CPU


@pytest.mark.usefixtures("as_on_a_card")
def test_moves_and_casts_of_the_model_pass_it_by(made: Made) -> None:
    model = made("untied", HOST)
    table = model.lm_head.weight
    assert isinstance(table, HostWeight)
    model.to("meta")
    assert model.device == table.device == torch.device("meta")
    assert table.weight_NK.device == CPU
    assert not any("embed_tokens" in name or "lm_head" in name for name in model.state_dict())


def test_the_keywords_of_from_pretrained(tiny_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(tiny_folder, 64, device="cpu", embedding="card", head="int8")
    assert model.places == Places("card", "int8")
    assert placed(model) == Places("card", "int8")
    with pytest.raises(ConfigError, match="head must be one of auto, card, host, int8, nf4, not 'disk'"):
        FastLanguageModel.from_pretrained(tiny_folder, 64, device="cpu", head="disk")


@pytest.mark.parametrize(
    ("needed", "expected"),
    [(100, Places()), (101, Places("host")), (110, Places("host")), (111, Places("host", "host"))],
)
def test_loading_puts_tables_where_there_is_room(needed: int, expected: Places) -> None:
    assert fitting(Places(), False, 10, needed, 100) == expected
    assert fitting(Places(), True, 10, needed, 100) == (Places() if needed == 100 else Places("host", "host"))
    assert fitting(Places("card", "card"), False, 10, needed, 100) == Places("card", "card"), "what is asked is obeyed"
    assert fitting(Places("auto", "nf4"), True, 10, needed, 100) == Places("auto", "nf4")
    assert fitting(Places("host", "auto"), False, 10, 100, 100) == Places("host", "auto")


def test_a_loading_is_counted_before_it_begins(tiny_llama: Callable[[str], Path], load: Callable[..., Any]) -> None:
    """No less than what the model then holds, and no more than the largest weight's making beside it."""
    for storage, flags in (("nf4", (True, False)), ("int8", (False, True)), ("dense", (False, False))):
        model = load(tiny_llama("untied"), torch.bfloat16, *flags)
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
        norms = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
        sizes = [m.in_features * m.out_features for name, m in model.linears() if name != "lm_head"]
        counted = loading._bytes(model, storage)
        assert sum(held.values()) - norms < counted < 1.1 * sum(held.values()) + 8 * max(sizes)
