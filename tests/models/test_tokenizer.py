"""``models.tokenizer``: padding that does no harm, on the side where answers do not begin."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from jebi.models.files import find
from jebi.models.tokenizer import beside, ready


def model(eos: int | list[int] | None = None) -> SimpleNamespace:
    settings = SimpleNamespace(pad_token_id=None, eos_token_id=eos)
    return SimpleNamespace(generation_config=settings, config=SimpleNamespace(pad_token_id=None))


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (["<|finetune_right_pad_id|>", "<pad>"], "<|finetune_right_pad_id|>"),
        (["<pad>"], "<pad>"),
        ([], "<|im_end|>"),
    ],
)
def test_a_padding_token_is_found(added: list[str], expected: str) -> None:
    tokenizer = find("smollm2").tokenizer()
    tokenizer.pad_token = None
    tokenizer.unk_token = None
    tokenizer.add_tokens(added)
    candidates = {"<unk>", "[PAD]", "<|reserved_special_token_0|>"} & tokenizer.get_vocab().keys()
    assert candidates == set()
    target = model()
    made = ready(tokenizer, target)
    assert made is tokenizer
    assert (tokenizer.pad_token, tokenizer.padding_side) == (expected, "left")
    assert target.generation_config.pad_token_id == target.config.pad_token_id == tokenizer.pad_token_id
    assert target.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_the_checkpoint_says_stays() -> None:
    tokenizer = find("smollm2").tokenizer()
    tokenizer.pad_token = "<|endoftext|>"
    target = model(eos=[2, 0])
    ready(tokenizer, target)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert target.generation_config.eos_token_id == [2, 0]


def test_the_tokenizer_beside_an_adapter_comes_first(tmp_path: Path) -> None:
    base, target = find("smollm2").tokenizer(), model()
    assert beside(None, base, target) is beside(tmp_path, base, target) is base
    longer = find("smollm2").tokenizer()
    longer.add_tokens(["<|swallow|>"])
    longer.save_pretrained(tmp_path)
    made = beside(tmp_path, base, target)
    assert made.convert_tokens_to_ids("<|swallow|>") == len(base)
    assert made.padding_side == "left"
