"""``generate`` through the engine beside transformers' own loop: the same tokens, greedy and drawn, for every setting.

Every field of `GenerationConfig` is in one of two tables: those the engine serves, and those that send the call to
transformers' loop (or to another of its modes). The tokens are compared either way.
"""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig
from jebi.errors import ConfigError, DataError, ModelError
from jebi.fast import FastLanguageModel
from jebi.inference.decoding import Decoding, _best_of_parts, why_not
from jebi.inference.engine import Engine
from jebi.inference.generation import _answer_once, prepare
from jebi.kernels import nf4_on_cpu
from jebi.models.hf import JebiForCausalLM

IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
MASK[2, :1] = 0
NEW = 12

SERVED: dict[str, Any] = {
    "max_length": 15,
    "max_new_tokens": 5,
    "min_length": 14,
    "min_new_tokens": 3,
    "max_time": 60.0,
    "stop_strings": ["e", "no"],
    "do_sample": True,
    "num_beams": 1,
    "use_cache": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.6,
    "min_p": 0.05,
    "top_h": 0.5,
    "typical_p": 0.7,
    "epsilon_cutoff": 0.004,
    "eta_cutoff": 0.004,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[40], [41, 42]],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "suppress_tokens": [40, 41],
    "begin_suppress_tokens": [40, 41],
    "sequence_bias": [[[40], 5.0]],
    "guidance_scale": 1.5,
    "watermarking_config": {"greenlist_ratio": 0.5, "bias": 4.0},
    "num_return_sequences": 2,
    "pad_token_id": 7,
    "bos_token_id": 1,
    "eos_token_id": [2, 40],
    "encoder_no_repeat_ngram_size": 2,
    "disable_compile": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": True,
    "output_logits": True,
}
"""Served by the engine; scores that are asked for without ``return_dict_in_generate`` are not returned by either."""

LEFT: dict[str, dict[str, Any]] = {
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "dynamic"},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    "num_beams": {"num_beams": 2},
    "early_stopping": {"num_beams": 2, "early_stopping": True},
    "length_penalty": {"num_beams": 2, "length_penalty": 0.5},
}
"""Left to transformers."""

ELSEWHERE = {
    "cache_config", "max_cache_len", "compile_config", "continuous_batching_config", "low_memory",  # of other caches
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_early_exit",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type",  # guessed tokens, a mode of its own
    "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",  # modes
    "token_healing",  # changes the prompts before the loop, and needs a tokenizer
    "decoder_start_token_id", "transformers_version",  # of encoder-decoders; no setting
}  # fmt: skip
"""Not settings of the loop of tokens: transformers is done with them before it, or runs another loop."""


class Counted(Decoding):
    """A decoding that says how often it was used."""

    calls = 0

    def answer(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().answer(*args, **kwargs)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[[str], Path], load, tokenizer) -> JebiForCausalLM:
    """With an adapter that is not zero."""
    made = load(tiny_llama("untied"))
    attach(made, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(made).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    prepare(made)
    made.decoding = Counted(Engine())
    return made


def both(
    model: JebiForCausalLM,
    *args: Any,
    served: bool = True,
    made_anew: dict[str, Callable[[], Any]] | None = None,
    **settings: Any,
) -> Tensor:
    """What the engine answers, after seeing that transformers' loop answers the same.

    ``made_anew`` are settings that cannot be used twice.
    """
    made_anew = made_anew or {}
    settings = {"pad_token_id": 0, "max_new_tokens": NEW, "attention_mask": MASK} | settings
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = {"do_sample": False} | settings
    ours, made = model.decoding, []
    assert isinstance(ours, Counted)
    before = ours.calls
    for model.decoding in (ours, None):
        torch.manual_seed(3)
        given = settings | {name: make() for name, make in made_anew.items()}
        output = model.generate(*args or (IDS,), **given)
        made.append(output if isinstance(output, Tensor) else output.sequences)
    model.decoding = ours
    assert torch.equal(*made)
    assert (ours.calls > before) == served
    return made[0]


def test_every_setting_has_its_place() -> None:
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    fields |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - set(SERVED) - set(LEFT) - ELSEWHERE == set()


@pytest.mark.parametrize("name", SERVED)
def test_what_the_engine_serves(model, tokenizer, name: str) -> None:
    settings: dict[str, Any] = {name: SERVED[name]}
    if name in ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        settings["do_sample"] = True
    if name == "num_return_sequences":
        settings["do_sample"] = True
    if name == "stop_strings":
        settings["tokenizer"] = tokenizer
    if name in ("max_length", "min_length"):
        settings["max_new_tokens"] = None
    if name == "min_length":
        settings |= {"max_length": 20, "eos_token_id": list(range(3, 200))}
    if name == "min_new_tokens":
        settings["eos_token_id"] = list(range(3, 200))
    both(model, **settings)


@pytest.mark.parametrize("name", LEFT)
def test_what_transformers_serves(model, name: str) -> None:
    both(model, served=False, **LEFT[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 1.5, "top_k": 0},
        {"top_k": 1},
    ],
    ids=str,
)
def test_the_same_seed_draws_the_same_tokens(model, settings: dict[str, Any]) -> None:
    made = both(model, do_sample=True, max_new_tokens=20, **settings)
    assert len(made[:, 9:].unique()) > 3


@pytest.mark.parametrize("mask", [None, MASK], ids=["even", "padded"])
def test_rows_that_end_early_are_filled_and_the_others_go_on(model, mask: Tensor | None) -> None:
    free = both(model, attention_mask=mask)
    end = free[0, 11].item()
    made = both(model, attention_mask=mask, eos_token_id=[end, 299])
    first = free[0, 9:].tolist().index(end) + 9
    assert made[0, first] == end
    assert made[0, first + 1 :].eq(0).all()


def test_a_batch_ends_when_its_last_row_does(model) -> None:
    free = both(model)
    made = both(model, eos_token_id=free[:, 11].tolist())
    assert made.shape[1] <= 12


def test_each_row_answers_as_it_does_alone(model) -> None:
    together = both(model, max_new_tokens=30)
    for row, mask, answer in zip(IDS, MASK, together, strict=True):
        alone = both(model, row[mask.bool()][None], attention_mask=None, max_new_tokens=30)
        assert answer[9:].tolist() == alone[0, mask.sum() :].tolist()


class Even(LogitsProcessor):  # type: ignore[misc]
    """Even tokens only; writes over what it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 1::2] = -torch.inf
        return scores


class Long(StoppingCriteria):  # type: ignore[misc]
    """Ends each row at its own length."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= length for length in (12, 14, 13)])


def test_processors_and_criteria_of_the_callers(model) -> None:
    made = both(model, logits_processor=[Even()], stopping_criteria=[Long()])
    assert made.shape[1] == 14
    assert made[:, 9:].remainder(2).eq(0).all()


def test_streamers_are_told_every_token(model, tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for decoding in (model.decoding, None):
        kept, model.decoding = model.decoding, decoding
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        tokens = model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=streamer)
        said.append((capsys.readouterr().out, tokens.tolist()))
        model.decoding = kept
    assert said[0] == said[1]
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=iterator)
    assert "".join(iterator) == said[0][0].removesuffix("\n")


def test_an_error_in_a_streamer_lets_go_of_the_buffers(model) -> None:
    class Broken:
        def put(self, value: Tensor) -> None:
            if value.dim() == 1:
                raise OSError("nobody listens")

        def end(self) -> None: ...

    with pytest.raises(OSError, match="nobody listens"):
        model.generate(IDS[:1], max_new_tokens=NEW, pad_token_id=0, streamer=Broken())
    assert model.decoding.engine._batches == {}
    both(model)


def test_threads_wait_for_each_other(model) -> None:
    """The engine's buffers are one answer's."""
    prompts = [IDS[:1], IDS[1:], IDS[2:]]
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(prompt, **settings) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        made = list(threads.map(lambda prompt: model.generate(prompt, **settings), prompts * 3))
    assert all(torch.equal(*pair) for pair in zip(made, expected * 3, strict=True))


def test_a_streamer_may_ask_the_model_meanwhile(model) -> None:
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS[:1], **settings)
    inner = []

    class Asking:
        def put(self, value: Tensor) -> None:
            if value.dim() == 1 and not inner:  # the first token; the prompt has two dimensions
                inner.append(model.generate(IDS[:1], **settings))

        def end(self) -> None: ...

    assert torch.equal(model.generate(IDS[:1], streamer=Asking(), **settings), expected)
    assert torch.equal(inner[0], expected)


def test_an_error_in_the_prompt_lets_go_of_the_buffers(model, monkeypatch) -> None:
    with monkeypatch.context() as failing:
        failing.setattr("jebi.inference.engine.flat_prompts", lambda *_: [][0])
        with pytest.raises(IndexError):
            model.generate(IDS, max_new_tokens=NEW, pad_token_id=0)
    assert model.decoding.engine._batches == {}
    both(model)


def test_a_mask_of_numbers(model) -> None:
    """Whatever its dtype, as transformers takes it."""
    expected = both(model)
    for mask in (MASK.float(), MASK.bool()):
        assert torch.equal(both(model, attention_mask=mask), expected)


def test_under_autocast(model) -> None:
    expected = both(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = both(model)
    assert torch.equal(made, expected)


def test_matrices_exchanged_in_their_parameters(model) -> None:
    """Which does not change a tensor's version."""
    before = both(model)
    tensors = list(adapter_tensors(model).values())
    kept = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data * -1.5
    model.drop_kept()  # casts of the matrices as they were, which transformers' loop reads
    changed = both(model)
    for tensor, data in zip(tensors, kept, strict=True):
        tensor.data = data
    assert not torch.equal(changed, before)
    assert torch.equal(both(model), before)


def holes() -> Tensor:
    mask = MASK.clone()
    mask[0, 4] = 0
    return mask


@pytest.mark.parametrize(
    ("keywords", "why"),
    [
        ({}, None),
        ({"attention_mask": MASK, "past_key_values": None, "logits_to_keep": 1, "use_cache": True}, None),
        ({"position_ids": torch.arange(9).expand(3, -1)}, None),
        ({"position_ids": (MASK.cumsum(-1) - 1).clamp(min=0), "attention_mask": MASK}, None),
        ({"position_ids": torch.arange(9).expand(3, -1) + 1}, "positions are given"),
        ({"attention_mask": MASK.flip(1)}, "padding stands elsewhere"),
        ({"attention_mask": holes()}, "padding stands elsewhere"),
        ({"attention_mask": MASK[:, 1:]}, "padding stands elsewhere"),
        ({"past_key_values": DynamicCache()}, "a cache was given"),
        ({"inputs_embeds": torch.zeros(3, 9, 64)}, "no tokens to begin with"),
        ({"labels": IDS}, "the model is given labels"),
    ],
    ids=str,
)
def test_why_a_call_is_left_to_transformers(model, keywords: dict[str, Any], why: str | None) -> None:
    found = why_not(model, IDS, GenerationConfig(max_length=20), keywords)
    assert found is None if why is None else why in found


def test_a_cache_of_the_callers_is_filled(model) -> None:
    cache = DynamicCache()
    both(model, served=False, made_anew={"past_key_values": DynamicCache})
    model.generate(IDS, max_new_tokens=3, pad_token_id=0, past_key_values=cache)
    assert cache.get_seq_length() == 11


def test_the_adapter_is_switched_within_one_loaded_model(model, tiny_llama, load) -> None:
    """And back: what a switch leaves in the buffers must not be read."""
    tuned = both(model)
    with model.disable_adapter():
        base = both(model)
    assert torch.equal(both(model), tuned)
    plain = load(tiny_llama("untied")).eval()
    expected = plain.generate(IDS, attention_mask=MASK, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(base, expected)
    assert not torch.equal(base, tuned)


def test_generating_under_inference_mode_and_outside_it(model) -> None:
    with torch.inference_mode():
        inside = both(model)
    assert torch.equal(both(model), inside)


def test_nothing_is_warned_of(model, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    both(model)
    assert not recwarn.list
    assert not caplog.records


@pytest.fixture
def fresh(tiny_llama: Callable[[str], Path], load) -> JebiForCausalLM:
    return load(tiny_llama("tied"), load_in_4bit=True)


def test_training_undoes_it(fresh: JebiForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    attach(fresh, LoraConfig(r=4, lora_dropout=0.1))
    FastLanguageModel.for_inference(fresh)
    assert fresh.decoding is not None
    # An adapter's dropout does nothing while a model answers.
    assert why_not(fresh, IDS, GenerationConfig(max_length=20), {}) is None
    FastLanguageModel.for_training(fresh)
    assert fresh.decoding is None
    assert all(layer.answering is None for layer in fresh.model.decoder_layers())
    fresh.eval()
    for _ in range(2):
        fresh.generate(IDS, max_new_tokens=1)
    assert caplog.text.count("training undid what made answers fast") == 1


@pytest.mark.parametrize("rows", [8, "8", (), (0,), (1, -1), (1.5,)], ids=str)
def test_rows_that_are_no_numbers_of_prompts(fresh: JebiForCausalLM, rows: Any) -> None:
    with pytest.raises(ConfigError, match=r"rows must be numbers of prompts .* such as \(1, 8\), not"):
        FastLanguageModel.for_inference(fresh, rows=rows)
    assert fresh.decoding is None


def test_a_prompt_without_tokens(fresh: JebiForCausalLM) -> None:
    for model in (fresh, FastLanguageModel.for_inference(fresh)):
        with pytest.raises(DataError, match="the prompt holds no tokens"):
            model.generate(IDS[:, :0], max_new_tokens=1)


def test_prompts_that_do_not_belong_to_the_model(fresh: JebiForCausalLM) -> None:
    """On a card a token that it does not have would end the process."""
    unknown = IDS.clone()
    unknown[2, 4] = fresh.config.vocab_size
    for model in (fresh, FastLanguageModel.for_inference(fresh)):
        with pytest.raises(DataError, match=f"^prompt 2 has the token {fresh.config.vocab_size}, but the model's are"):
            model.generate(unknown, max_new_tokens=1)
        with pytest.raises(DataError, match=r"^attention_mask is 9 tokens wide and the prompts are 8"):
            model.generate(IDS[:, :8], attention_mask=MASK, max_new_tokens=1)
        padded = IDS.masked_fill(MASK == 0, fresh.config.vocab_size)
        answers = [model.generate(ids, attention_mask=MASK, max_new_tokens=2)[:, -2:] for ids in (IDS, padded)]
        assert torch.equal(*answers), "padding may be any token"


def test_a_copy_is_made_before_it_or_after_it_is_undone(fresh: JebiForCausalLM) -> None:
    attach(fresh, LoraConfig(r=4))
    FastLanguageModel.for_inference(fresh)
    copies: list[Callable[..., Any]] = [copy.deepcopy, pickle.dumps, FastLanguageModel.reference_of]
    for made in copies:
        with pytest.raises(
            ModelError, match=r"not copied or pickled: call FastLanguageModel.for_training\(model\) first"
        ):
            made(fresh)
    twin = copy.deepcopy(FastLanguageModel.for_training(fresh))
    with torch.no_grad():
        for tensor in adapter_tensors(fresh).values():
            tensor.add_(0.5)
    answers = []
    for model in (twin, fresh):
        FastLanguageModel.for_inference(model)
        answers.append(model(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=1)[:, -1], answers[-1][:, -1].argmax(-1))
    assert not torch.equal(*answers), "each has an adapter of its own"


def test_four_bits_are_dequantised_once_for_both_ways(fresh: JebiForCausalLM) -> None:
    expected = fresh.eval()(IDS).logits
    prepare(fresh)
    linear = next(fresh.model.decoder_layers()).self_attn.k_proj
    kept = next(fresh.model.answering_groups()).base.kept()
    assert kept is not None
    assert kept.data_ptr() <= linear.dense().data_ptr() < kept.data_ptr() + kept.nbytes
    assert torch.equal(fresh(IDS).logits, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_few_rows_multiply_the_4_bits(tiny_llama, load, monkeypatch: pytest.MonkeyPatch, adapted: bool) -> None:
    """By a product in the kernel's place, exact and counted: prompts and tokens are still transformers' own."""
    calls = []

    def product_of(weights, dtype):
        def product(x_MK: Tensor) -> Tensor:
            calls.append(x_MK.shape[0])
            return nf4_on_cpu.product_reference(x_MK, weights)

        return product

    monkeypatch.setattr(nf4_on_cpu, "product_of", product_of)
    made = load(tiny_llama("even"), load_in_4bit=True)
    if adapted:
        attach(made, LoraConfig(r=4))
        with torch.no_grad():
            for tensor in adapter_tensors(made).values():
                tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(tensor.numel()))
    prepare(made)
    made.decoding = Counted(Engine())
    both(made)
    # Four groups a layer, two layers, each new token but the last.
    assert calls == [len(IDS)] * (4 * 2 * (NEW - 1))


@pytest.mark.skipif(not nf4_on_cpu.available(), reason="the CPU or bitsandbytes has no kernel for 4 bits")
@torch.no_grad()
def test_4_bits_answer_as_near_as_bfloat16(tiny_llama, load, monkeypatch, caplog) -> None:
    """Logits of a step by bitsandbytes' kernel, beside those of 4 bits dequantised, in float32.

    The bar is twice what the whole model in bfloat16 is off: the kernel rounds scales as well.
    """

    def logits(dtype: torch.dtype) -> Tensor:
        made = load(tiny_llama("even"), load_in_4bit=True, dtype=dtype)
        prepare(made)
        engine = Engine()
        engine.prefill(made, IDS[:, :-1], [8] * len(IDS), 9)
        return engine.step(made, IDS).float()

    with monkeypatch.context() as patch:
        patch.setattr(nf4_on_cpu, "available", lambda: False)
        exact, rounded = logits(torch.float32), logits(torch.bfloat16)
    assert not caplog.records
    ours = logits(torch.float32)
    assert "in bfloat16" in caplog.text
    assert 0 < (ours - exact).norm() <= 2 * (rounded - exact).norm()


def test_what_cannot_be_laid_together_goes_through_transformers(tiny_llama, load) -> None:
    made = load(tiny_llama("tied"))
    attach(made, LoraConfig(r=4, use_dora=True))
    prepare(made)
    made.decoding = Counted(Engine())
    both(made, served=False)


def test_of_equal_scores_the_first_is_taken_in_two_steps_too() -> None:
    scores = torch.zeros(5, 640)
    scores[1, [7, 300, 639]] = 1.0
    scores[2, 639] = 2.0
    scores[3] = -torch.inf
    scores[4, [20, 21]] = torch.nan
    assert torch.equal(_best_of_parts(scores), scores.argmax(-1))
    assert _best_of_parts(scores).tolist() == [0, 7, 639, 0, 20]


def test_answers_made_ahead_change_neither_settings_nor_seeds(model: JebiForCausalLM, monkeypatch, caplog) -> None:
    """Whatever the model's own settings ask for, the engine makes them; nothing is said."""
    made: list[tuple[int, bool]] = []
    answer = Decoding.answer

    def counted(self: Decoding, model: JebiForCausalLM, ids: Tensor, mask: Any, *rest: Any) -> Tensor:
        made.append((len(ids), rest[2].do_sample))
        return answer(self, model, ids, mask, *rest)

    monkeypatch.setattr(Decoding, "answer", counted)
    given = GenerationConfig(num_beams=3, stop_strings=["a"], top_k=7, do_sample=True, return_dict_in_generate=True)
    monkeypatch.setattr(model, "generation_config", given)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    _answer_once(model, (1, 3))
    assert made == [(1, False), (1, True), (3, False), (3, True)]
    assert model.generation_config is given
    assert torch.equal(torch.get_rng_state(), before)
    assert not caplog.records


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.embed_tokens.weight"])
def test_answers_made_ahead_take_any_weights(tiny_llama: Callable[[str], Path], load, weight: str) -> None:
    """Scores that are no numbers end a drawn answer, on a card the whole process."""
    broken = load(tiny_llama("untied"))
    prepare(broken)
    with torch.no_grad():
        broken.get_parameter(weight).view(-1)[0] = torch.nan
    with pytest.raises(RuntimeError, match="probability tensor"):
        broken.generate(torch.zeros(1, 2, dtype=torch.long), do_sample=True, max_new_tokens=1)
    _answer_once(broken, (1,))


def test_answers_made_ahead_are_deterministic_where_that_is_asked(model: JebiForCausalLM, monkeypatch) -> None:
    """torch refuses sums along rows of a card's floats then, which top_p takes; a CPU's it does not."""
    plain = torch.Tensor.cumsum

    def refused(values: Tensor, dim: int) -> Tensor:
        assert not values.is_floating_point()
        return plain(values, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", refused)
    with pytest.raises(AssertionError):
        _answer_once(model, (1,))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    _answer_once(model, (1,))
