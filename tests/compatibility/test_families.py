"""Every family against transformers, PEFT and bitsandbytes on the same tiny checkpoint, in float32.

What is compared is the largest difference as a share of the largest value. 1e-4 is the bar: float32's roundings (6e-8
each), grown by the sums of four layers, stay near 1e-6, while a wrong flag, mask or position is off by more than 1e-2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
)

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.errors import ModelError
from jebi.inference.generation import prepare
from jebi.models.families import FAMILIES
from jebi.models.hf import JebiForCausalLM
from jebi.models.reward import JebiForSequenceClassification

BAR = 1e-4
NAMES = (
    "llama", "llama, biases, llama3 RoPE", "mistral", "mistral, window", "ministral", "qwen2", "qwen2, window, YaRN",
    "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi3, part of a head turned, longrope",
    "phi3, longrope that generation outgrows",
)  # fmt: skip
every = pytest.mark.parametrize("name", NAMES)
Twins = tuple[JebiForCausalLM, Any]


def transformers_model(folder: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


@pytest.fixture
def twins(checkpoint, load) -> Callable[..., Twins]:
    """``twins(name)``: jebi's model and transformers' with PEFT's, every adapter number equal and none of them zero."""

    def make(name: str, load_in_4bit: bool = False, adapted: bool = True) -> Twins:
        ours = load(checkpoint(name), load_in_4bit=load_in_4bit)
        settings: dict[str, Any] = {}
        if load_in_4bit:
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        theirs = transformers_model(checkpoint(name), **settings)
        if not adapted:
            return ours.eval(), theirs.eval()
        targets = sorted({path.rpartition(".")[2] for path, _ in ours.linears() if path != "lm_head"})
        lora: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets}
        attach(ours, LoraConfig(**lora))
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
        parameters = dict(theirs.named_parameters())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, tensor in adapter_tensors(ours).items():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
                parameters[path.replace(".weight", ".default.weight")].copy_(tensor)
        return ours.train(), theirs.train()

    return make


@every
def test_logits_loss_and_gradients(name: str, twins, rows, note, difference) -> None:
    worst = {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    for form in ("right", "left", "packed"):
        ours, theirs = twins(name)
        inputs = rows(name, form)
        mine, other = ours(**inputs, return_logits=True), theirs(**inputs, use_cache=False)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        worst["logits"] = max(worst["logits"], difference(mine.logits[real], other.logits[real]))
        worst["loss"] = max(worst["loss"], difference(mine.loss, other.loss))
        mine.loss.backward()
        other.loss.backward()
        parameters = dict(theirs.named_parameters())
        for path, tensor in adapter_tensors(ours).items():
            grad = parameters[path.replace(".weight", ".default.weight")].grad
            worst["gradients"] = max(worst["gradients"], difference(tensor.grad, grad))
    for column, value in worst.items():
        note(name, column, value)
        assert value < BAR, column


@every
@pytest.mark.parametrize("checkpointing", ["recompute", "plain"])
def test_other_ways_through_the_layers_give_the_same(name: str, checkpointing: str, twins, rows, difference) -> None:
    """Activations recomputed, and every layer's plain form."""
    first, second = twins(name)[0], twins(name)[0]
    if checkpointing == "plain":
        second.model.plain = True
    else:
        second.model.checkpointing = "recompute"
    losses = [model(**rows(name, "packed")).loss for model in (first, second)]
    for loss in losses:
        loss.backward()
    assert difference(*losses) < BAR
    others = adapter_tensors(second)
    for path, tensor in adapter_tensors(first).items():
        assert difference(others[path].grad, tensor.grad) < BAR, path


@every
@pytest.mark.parametrize("ready", ["as loaded", "made ready to answer", "in few launches, as on a card"])
def test_generation(name: str, ready: str, twins, rows, note) -> None:
    """Greedy, prompts of different lengths padded on the left, past every window; through either loop of tokens."""
    ours, theirs = (model.eval() for model in twins(name))
    if ready != "as loaded":
        prepare(ours)
    if "few" in ready:
        ours.model.lay_for_few_rows()
        assert all(layer.few_rows is not None for layer in ours.model.decoder_layers())
    inputs = rows(name, "left")
    del inputs["labels"]
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    tokens = [model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :] for model in (ours, theirs)]
    assert torch.equal(*tokens)
    assert len(tokens[0].unique()) > 8
    note(name, "generation", f"{tokens[0].numel()} tokens equal")
    if ready != "as loaded":
        assert served(ours, inputs)
        for row, mask, answer in zip(inputs["input_ids"], inputs["attention_mask"], tokens[0], strict=True):
            assert torch.equal(ours.generate(row[mask.bool()][None], **settings)[0, -16:], answer)


def served(model: JebiForCausalLM, inputs: dict[str, Any]) -> bool:
    """Whether jebi's engine serves the call."""
    assert model.decoding is not None
    keywords = {"attention_mask": inputs["attention_mask"]}
    return model.decoding.serves(model, inputs["input_ids"], GenerationConfig(max_length=99), keywords)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("ready", [False, True], ids=["as loaded", "made ready to answer"])
def test_each_row_outgrows_its_frequencies_at_its_own_length(settings: dict[str, Any], ready: bool, twins) -> None:
    """Three rows that cross 20 tokens at different steps: each answers as transformers lets it alone."""
    ours, theirs = (model.eval() for model in twins("phi3, longrope that generation outgrows"))
    if ready:
        prepare(ours)
    prompts = [torch.randint(3, 300, (1, n), generator=torch.Generator().manual_seed(n)) for n in (13, 7, 2)]
    batch, mask = (torch.zeros(3, 13, dtype=torch.long) for _ in range(2))
    for row, prompt in enumerate(prompts):
        batch[row, 13 - prompt.shape[1] :], mask[row, 13 - prompt.shape[1] :] = prompt[0], 1
    settings = settings | {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    made = ours.generate(batch, attention_mask=mask, **settings)[:, 13:]
    for prompt, answer in zip(prompts, made, strict=True):
        alone = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert torch.equal(answer, alone[0, -20:])


@pytest.mark.parametrize("name", ["mistral, window", "gemma2"])
def test_generation_from_embeddings(name: str, twins, rows) -> None:
    ours, theirs = (model.eval() for model in twins(name))
    inputs = rows(name, "left")
    tokens = [
        model.generate(
            inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        for model in (ours, theirs)
    ]
    assert torch.equal(*tokens)


def test_embeddings_do_not_tell_how_to_begin_again(twins) -> None:
    ours = twins("phi3, longrope that generation outgrows")[0].eval()
    embeds = ours.get_input_embeddings()(torch.full((1, 18), 7))
    mask = torch.ones(1, 18, dtype=torch.long)
    with pytest.raises(ModelError, match="outgrew its RoPE's first frequencies"):
        ours.generate(inputs_embeds=embeds, attention_mask=mask, min_new_tokens=9, max_new_tokens=9, pad_token_id=0)


@every
def test_saving_and_loading(name: str, checkpoint, load, rows, note, difference, tmp_path: Path) -> None:
    """What jebi writes is what transformers wrote, and both read it."""
    model, inputs = load(checkpoint(name)), rows(name, "right")
    model.save_pretrained(tmp_path)
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**ids).logits[real]
        assert torch.equal(load(tmp_path)(**ids).logits[real], logits)
        value = difference(logits, transformers_model(tmp_path)(**ids).logits[real])
    note(name, "save, load", value)
    assert value < BAR


@every
def test_saving_in_4_bits(name: str, checkpoint, load, rows, difference, tmp_path: Path) -> None:
    """It becomes a bitsandbytes checkpoint, and both read the same weights from it."""
    model, inputs = load(checkpoint(name), load_in_4bit=True), rows(name, "right")
    model.save_pretrained(tmp_path)
    ids = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    real = inputs["attention_mask"].bool()
    # In evaluation bitsandbytes would multiply in bfloat16 on a CPU that can; there is no dropout.
    theirs = transformers_model(tmp_path, device_map="cpu").train()
    with torch.no_grad():
        logits = model(**ids).logits[real]
        assert torch.equal(load(tmp_path, load_in_4bit=True)(**ids).logits[real], logits)
        assert difference(logits, theirs(**ids).logits[real]) < BAR


@every
def test_4_bits(name: str, twins, rows, note, difference) -> None:
    """The same NF4 bytes as bitsandbytes, so the same model as transformers loads in 4 bits."""
    ours, theirs = twins(name, load_in_4bit=True)
    inputs = rows(name, "packed")
    mine, other = ours(**inputs, return_logits=True), theirs(**inputs, use_cache=False)
    mine.loss.backward()
    other.loss.backward()
    value = difference(mine.logits, other.logits)
    parameters = dict(theirs.named_parameters())
    for path, tensor in adapter_tensors(ours).items():
        grad = parameters[path.replace(".weight", ".default.weight")].grad
        value = max(value, difference(tensor.grad, grad))
    note(name, "4 bits", value)
    assert value < BAR


@every
def test_peft_reads_the_adapter(name: str, twins, rows, note, difference, checkpoint, tmp_path: Path) -> None:
    ours = twins(name)[0].eval()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(transformers_model(checkpoint(name)), tmp_path).eval()
    inputs = rows(name, "packed")
    with torch.no_grad():
        value = difference(ours(**inputs, return_logits=True).logits, theirs(**inputs, use_cache=False).logits)
    note(name, "PEFT", value)
    assert value < BAR


@every
@torch.no_grad()
def test_the_scoring_model_is_transformers(name: str, checkpoint, load, rows, difference, tmp_path: Path) -> None:
    """Saved whole, it is loaded as the family's own sequence classifier."""
    ours = JebiForSequenceClassification(load(checkpoint(name)))
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    inputs = {key: value for key, value in rows(name, "right").items() if key != "labels"}
    # transformers knows a row's end by its pad tokens.
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"] == 1, theirs.config.pad_token_id)
    assert difference(ours(**inputs).logits, theirs(**inputs).logits) <= BAR


def test_every_checkpoint_is_here(checkpoint_names: list[str], model_types: set[str]) -> None:
    assert sorted(NAMES) == sorted(checkpoint_names)
    assert model_types == set(FAMILIES)


@torch.no_grad()
def test_a_score_is_read_before_the_pad_tokens_where_no_mask_is_given(checkpoint, load, difference, tmp_path) -> None:
    ours = JebiForSequenceClassification(load(checkpoint("llama")))
    ours.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]])
    assert difference(ours(ids).logits, theirs(ids).logits) <= BAR
