"""SmolLM2 against transformers on the same weights: gradients, and answers token by token, greedy and sampled."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.inference.generation import prepare
from jebi.models.files import find
from jebi.models.tokenizer import ready

QUESTIONS = [
    "What is the capital of France?",
    "대한민국의 수도는 어디인가요?",
    "Write one sentence about the sea, please, and make it a sad one.",
]
NEW = 8


@pytest.fixture(scope="module")
def models(smollm2_folder, load) -> SimpleNamespace:
    """Both models in float32 and jebi's tokenizer."""
    ours = load(smollm2_folder)
    ours.generation_config = find(str(smollm2_folder)).generation_config()
    tokenizer = ready(find("smollm2").tokenizer(), ours)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    theirs.generation_config.pad_token_id = tokenizer.pad_token_id
    return SimpleNamespace(ours=ours, theirs=theirs, tokenizer=tokenizer)


def ask(models: SimpleNamespace, questions: list[str]) -> dict[str, torch.Tensor]:
    texts = [
        models.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    return dict(models.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False))


def answers(models: SimpleNamespace, inputs: dict[str, torch.Tensor], **settings: Any) -> list[torch.Tensor]:
    """The new tokens of both."""
    made = []
    for model in (models.ours, models.theirs):
        torch.manual_seed(7)
        output = model.generate(**inputs, max_new_tokens=NEW, **settings)
        made.append(output[:, inputs["input_ids"].shape[1] :])
    return made


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answer(models, question: str) -> None:
    ours, theirs = answers(models, ask(models, [question]), do_sample=False)
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, NEW) or ours[0, -1] == models.tokenizer.eos_token_id


def test_greedy_answers_to_a_left_padded_batch(models) -> None:
    inputs = ask(models, QUESTIONS)
    assert inputs["attention_mask"].eq(0).any()
    ours, theirs = answers(models, inputs, do_sample=False)
    assert torch.equal(ours, theirs)


def test_answers_through_the_engine_together_and_alone(models, load, smollm2_folder) -> None:
    """Prompts of different lengths, rows that end at different tokens or not at all."""
    ours = prepare(load(smollm2_folder))
    ours.generation_config = models.ours.generation_config
    inputs = ask(models, QUESTIONS)
    settings = {"max_new_tokens": 24, "do_sample": False, "stop_strings": [" sea", "."], "tokenizer": models.tokenizer}
    together = ours.generate(**inputs, **settings)
    assert torch.equal(together, models.theirs.generate(**inputs, **settings))
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], together, strict=True):
        alone = ours.generate(ids[mask.bool()][None], **settings)[0, mask.sum() :]
        answer = row[len(mask) :]
        assert torch.equal(answer[: len(alone)], alone)
        assert answer[len(alone) :].eq(models.tokenizer.pad_token_id).all()


def test_any_of_several_eos_tokens_ends_an_answer(models) -> None:
    inputs = ask(models, [QUESTIONS[0], QUESTIONS[2]])
    free, _ = answers(models, inputs, do_sample=False)
    ends = [models.tokenizer.eos_token_id, free[0, 3].item()]
    ours, theirs = answers(models, inputs, do_sample=False, eos_token_id=ends)
    assert torch.equal(ours, theirs)
    first = free[0].tolist().index(ends[1])
    assert ours[0, first] == ends[1]
    assert ours[0, first + 1 :].eq(models.tokenizer.pad_token_id).all()


def test_repetition_penalty(models) -> None:
    inputs = ask(models, QUESTIONS[:1])
    ours, theirs = answers(models, inputs, do_sample=False, repetition_penalty=1.5)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, answers(models, inputs, do_sample=False)[0])


def test_sampling_with_one_seed(models) -> None:
    """Equal draws from equal probabilities: a logit that differs in the sixth digit moves a draw once in 1e5 tokens."""
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9}
    ours, theirs = answers(models, ask(models, QUESTIONS[:2]), **settings)
    assert torch.equal(ours, theirs)


@pytest.fixture
def adapted(models) -> Iterator[tuple[Any, Any]]:
    """Both models with one and the same adapter, taken off again afterwards."""
    settings: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    }
    attach(models.ours, LoraConfig(**settings))
    theirs = peft.get_peft_model(models.theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    parameters = dict(theirs.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in adapter_tensors(models.ours).items():
            if "lora_B" in name:
                tensor.normal_(std=0.02, generator=generator)
            parameters[name.replace(".weight", ".default.weight")].copy_(tensor)
    yield models.ours.train(), theirs.train()
    for _, linear in models.ours.linears():
        linear.lora = None
    models.ours.adapter = None
    models.ours.eval()
    theirs.unload().eval()


LAYOUTS = ("right", "left", "packed")


def lay_out(models: SimpleNamespace, layout: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two rows with their labels, and where their tokens are."""
    texts = ["The sea is cold tonight.", "안녕하세요, 반갑습니다."]
    if layout == "packed":
        rows = models.tokenizer(texts)["input_ids"]
        ids = torch.tensor([rows[0] + rows[1]])
        positions = torch.tensor([[*range(len(rows[0])), *range(len(rows[1]))]])
        labels = ids.where(positions != 0, -100)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}, torch.ones_like(ids).bool()
    inputs = dict(models.tokenizer(texts, return_tensors="pt", padding=True, padding_side=layout))
    real = inputs["attention_mask"].bool()
    first = real & (inputs["attention_mask"].cumsum(-1) == 1)
    return inputs | {"labels": inputs["input_ids"].where(real & ~first, -100)}, real


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradients(models, adapted, layout: str) -> None:
    ours, theirs = adapted
    inputs, real = lay_out(models, layout)
    mine, other = ours(**inputs, return_logits=True), theirs(**inputs, use_cache=False)
    mine.loss.backward()
    other.loss.backward()
    parameters = dict(theirs.named_parameters())
    pairs = {"logits": (mine.logits[real], other.logits[real]), "loss": (mine.loss, other.loss)} | {
        name: (tensor.grad, parameters[name.replace(".weight", ".default.weight")].grad)
        for name, tensor in adapter_tensors(ours).items()
    }
    assert len(pairs) == 2 + 2 * 4 * 30
    for name, (one, two) in pairs.items():
        # Of the largest value: float32's roundings (6e-8 each), grown by the sums of 30 layers.
        assert (one - two).abs().max() <= 1e-4 * two.abs().max(), name
