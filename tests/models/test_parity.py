"""The model against transformers and PEFT on the same weights: logits, loss and every trained gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import TARGET_MODULES, LoraConfig
from jebi.errors import ModelError
from jebi.models.hf import JebiForCausalLM

LENGTHS = [11, 7, 4]
LONGEST = max(LENGTHS)
VARIANTS = ("tied", "untied", "biased", "llama3")


def twins(
    load: Callable[..., JebiForCausalLM], folder: Path, bias: str = "none", targets: tuple[str, ...] = TARGET_MODULES
) -> tuple[JebiForCausalLM, peft.PeftModel]:
    """jebi's model and transformers' with PEFT's adapter, every trained number equal and none of them zero."""
    ours = load(folder)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": list(targets), "bias": bias}
    attach(ours, LoraConfig(**settings))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    parameters = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in adapter_tensors(ours).items():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
            parameters[peft_name(name)].copy_(tensor)
    return ours.train(), theirs.train()


def peft_name(name: str) -> str:
    """A stored name as PEFT's modules have it."""
    return name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight")


def padded(side: str) -> dict[str, Tensor]:
    """Rows of `LENGTHS` padded on one side; their first two tokens are a prompt."""
    ids = torch.randint(3, 300, (len(LENGTHS), LONGEST), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        start = 0 if side == "right" else LONGEST - length
        mask[row, start : start + length] = 1
        labels[row, start + 2 : start + length] = ids[row, start + 2 : start + length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed() -> dict[str, Tensor]:
    """The same number of rows end to end, as transformers' DataCollatorWithFlattening makes them."""
    ids = torch.randint(3, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions != 0, -100)}


def close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest value: float32's roundings (6e-8 each) grown by sums over two layers stay below 1e-5,
    while a wrong scale, position or mask is off by more than 1e-2."""
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def assert_same(ours: JebiForCausalLM, theirs: peft.PeftModel, inputs: dict[str, Tensor]) -> None:
    """Logits at real tokens, loss, and the gradient of everything trained."""
    mine, other = ours(**inputs, return_logits=True), theirs(**inputs, use_cache=False)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    close("logits", mine.logits[real], other.logits[real])
    close("loss", mine.loss, other.loss)
    mine.loss.backward()
    other.loss.backward()
    assert_same_gradients(ours, theirs)


def assert_same_gradients(ours: JebiForCausalLM, theirs: peft.PeftModel) -> None:
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    stored = adapter_tensors(ours)
    assert {peft_name(name) for name in stored} == trained.keys()
    assert ours.trainable_parameters()[0] == sum(p.numel() for p in trained.values())
    for name, tensor in stored.items():
        close(name, tensor.grad, trained[peft_name(name)].grad)
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("inputs", [padded("right"), padded("left"), packed()], ids=["right", "left", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_gradients(tiny_llama, load, variant: str, inputs: dict[str, Tensor]) -> None:
    assert_same(*twins(load, tiny_llama(variant)), inputs)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("targets", [TARGET_MODULES, ("q_proj", "down_proj")], ids=["all", "two"])
def test_trained_biases(tiny_llama, load, targets: tuple[str, ...], bias: str) -> None:
    assert_same(*twins(load, tiny_llama("biased"), bias, targets), padded("right"))


@pytest.mark.parametrize("checkpointing", ["keep_attention", "recompute", "offload"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kept", [0, 1])
def test_whatever_layers_keep(tiny_llama, load, kept: int, plain: bool, checkpointing: str) -> None:
    ours, theirs = twins(load, tiny_llama())
    ours.model.plain, ours.model.checkpointing, ours.model.kept_layers = plain, checkpointing, kept
    assert_same(ours, theirs, padded("right"))


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_gate_and_up_sent_to_host_memory_by_some_layers(tiny_llama, load, sent: int) -> None:
    ours, theirs = twins(load, tiny_llama())
    ours.model.checkpointing, ours.model.shipped_layers = "offload", sent
    assert sum(keeping.wide is not None for keeping in ours.model._keeping(ours.device)) == sent
    assert_same(ours, theirs, padded("right"))


@pytest.mark.parametrize("checkpointing", ["keep_attention", "recompute", "offload"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_layers_in_chunks_of_tokens(tiny_llama, load, chunk: int, checkpointing: str) -> None:
    ours, theirs = twins(load, tiny_llama())
    ours.model.checkpointing, ours.model.chunk_tokens = checkpointing, chunk
    assert_same(ours, theirs, padded("right"))
    # And again: the first backward has left nothing behind, nor written over anything but its own.
    for model in (ours, theirs):
        model.zero_grad()
    assert_same(ours, theirs, packed())


@pytest.mark.parametrize("checkpointing", ["none", "offload"])
def test_without_a_backward_layers_go_in_chunks_too(tiny_llama, load, checkpointing: str) -> None:
    ours, _ = twins(load, tiny_llama())
    ours.model.checkpointing, ours.model.chunk_tokens = checkpointing, 5
    with torch.no_grad():
        chunked = ours(**packed(), return_logits=True)
        ours.model.plain = True
        plain = ours(**packed(), return_logits=True)
    close("logits", chunked.logits, plain.logits)
    close("loss", chunked.loss, plain.loss)


def test_what_is_in_host_memory_serves_one_backward(tiny_llama, load) -> None:
    ours, _ = twins(load, tiny_llama())
    ours.model.checkpointing = "offload"
    loss = ours(**packed()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="use_gradient_checkpointing=True"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", ["none", "recompute"])
def test_the_graph_may_be_gone_through_again(tiny_llama, load, checkpointing: str) -> None:
    ours, _ = twins(load, tiny_llama())
    ours.model.checkpointing = checkpointing
    loss = ours(**packed()).loss
    loss.backward(retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in adapter_tensors(ours).items()}
    loss.backward()
    for name, tensor in adapter_tensors(ours).items():
        assert torch.equal(tensor.grad, 2 * once[name]), name


def test_plain_layers(tiny_llama, load) -> None:
    ours, theirs = twins(load, tiny_llama())
    ours.model.plain = True
    assert_same(ours, theirs, padded("left"))


def test_an_adapter_with_dropout_answers_as_one_without(tiny_llama, load) -> None:
    ours, theirs = twins(load, tiny_llama())
    for _, linear in ours.linears():
        if linear.lora is not None:
            linear.lora.dropout = 0.5
    assert_same(ours.eval(), theirs.eval(), padded("right"))


def test_bfloat16_is_as_near_to_float64_as_transformers(tiny_llama, load, at_most_twice) -> None:
    ids = padded("right")["input_ids"]
    results = [load(tiny_llama(), torch.bfloat16)(ids).logits]
    for dtype in (torch.bfloat16, torch.float64):
        # From the weights as bfloat16 has them, so that only the arithmetic differs.
        model = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.bfloat16).to(dtype)
        results.append(model(ids).logits)
    at_most_twice("logits", *(logits.detach() for logits in results))


def test_several_packed_rows_in_a_batch(tiny_llama, load) -> None:
    one = packed()
    both = {name: torch.cat([value, value.flip(0)]) for name, value in one.items()}
    both["input_ids"][1] = both["input_ids"][1].roll(5)
    both["position_ids"][1] = torch.cat([torch.arange(n) for n in (3, 9, sum(LENGTHS) - 12)])
    both["labels"] = both["input_ids"].where(both["position_ids"] != 0, -100)
    assert_same(*twins(load, tiny_llama()), both)


def test_labels_never_cross_a_restarting_position(tiny_llama, load) -> None:
    model, inputs = load(tiny_llama()), packed()
    unmasked = inputs | {"labels": inputs["input_ids"]}
    assert torch.equal(model(**unmasked).loss, model(**inputs).loss)


def test_positions_beside_a_mask(tiny_llama, load) -> None:
    inputs = padded("left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_same(*twins(load, tiny_llama()), inputs | {"position_ids": positions})


def test_embeddings_instead_of_ids(tiny_llama, load) -> None:
    model, ids = load(tiny_llama()), packed()["input_ids"]
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_logits_to_keep(tiny_llama, load) -> None:
    model, ids = load(tiny_llama()), padded("right")["input_ids"]
    everything = model(ids).logits
    # The head's product is blocked otherwise for fewer rows.
    close("one", model(ids, logits_to_keep=1).logits, everything[:, -1:])
    close("some", model(ids, logits_to_keep=torch.tensor([0, 4])).logits, everything[:, [0, 4]])


def test_nothing_labelled_costs_and_teaches_nothing(tiny_llama, load) -> None:
    ours, _ = twins(load, tiny_llama())
    inputs = padded("right")
    loss = ours(**inputs | {"labels": torch.full_like(inputs["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad.eq(0).all() for tensor in adapter_tensors(ours).values())


def test_loss_settings(tiny_llama, load) -> None:
    model, inputs = load(tiny_llama()), padded("right")
    mean, learnt = model(**inputs).loss, (inputs["labels"][:, 1:] != -100).sum()
    close("summed", model(**inputs, num_items_in_batch=1).loss, mean * learnt)
    shifted = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(**inputs, shift_labels=shifted).loss, mean)
    logits = model(**inputs).logits.flatten(0, 1)
    smoothed = torch.nn.functional.cross_entropy(logits, shifted.flatten(), label_smoothing=0.1)
    close("smoothed", model(**inputs, shift_labels=shifted, label_smoothing=0.1).loss, smoothed)
    assert model(**inputs, shift_labels=shifted).logits is None


def test_disabled_adapter_is_the_base_model(tiny_llama, load) -> None:
    ours, _ = twins(load, tiny_llama())
    ids, base = packed()["input_ids"], load(tiny_llama())
    tuned = ours(ids).logits
    with ours.disable_adapter():
        assert torch.equal(ours(ids).logits, base(ids).logits)
    assert torch.equal(ours(ids).logits, tuned)
    assert not torch.equal(tuned, base(ids).logits)


def test_autocast_does_not_recast_the_model(tiny_llama, load) -> None:
    model, ids = load(tiny_llama()), packed()["input_ids"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids).logits
    assert torch.equal(logits, model(ids).logits)


@pytest.mark.parametrize("setting", ["output_hidden_states", "output_attentions"])
def test_what_is_never_held_is_refused(tiny_llama, load, setting: str) -> None:
    with pytest.raises(ModelError, match=f"{setting}.* not available"):
        load(tiny_llama())(torch.ones(1, 3, dtype=torch.long), **{setting: True})


def test_ids_and_embeddings_exclude_each_other(tiny_llama, load) -> None:
    ours = load(tiny_llama())
    ids = torch.full((1, 4), 7)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": ours.get_input_embeddings()(ids)}):
        with pytest.raises(ModelError, match="input_ids or inputs_embeds, one of the two"):
            ours(**inputs)


def test_masks_of_four_dimensions_are_refused(tiny_llama, load) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"attention_mask must be \(batch, tokens\)"):
        load(tiny_llama())(ids, attention_mask=torch.ones(1, 1, 3, 3))


def test_padding_in_front_predicts_nothing(tiny_llama, load) -> None:
    """Where labels are given for every real token, the loss is that of the row without its padding."""
    ours, row = load(tiny_llama()), torch.arange(5, 12)[None]
    ids, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), row), 1), torch.tensor([[0] * 3 + [1] * 7])
    loss = ours(ids, attention_mask=mask, labels=ids.where(mask == 1, -100)).loss
    assert torch.equal(loss, ours(row, labels=row).loss)


def test_disabling_twice_leaves_the_adapter_off_in_between(tiny_llama, load) -> None:
    ours, _ = twins(load, tiny_llama())
    ids = torch.arange(5, 12)[None]
    with torch.no_grad(), ours.eval().disable_adapter():
        base = ours(ids).logits
        with ours.disable_adapter():
            pass
        assert torch.equal(ours(ids).logits, base)
