"""What a tokenizer puts around text: BOS, the tokens that end an answer, and how its chat template opens one.

Read from the tokenizer itself, so that no model needs an entry in a list.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_QUESTION, _ANSWER = "jebi asks", "jebi answers"

_BLANKS = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": " ", "ĉ": " ", "č": " "})
"""How byte-level and sentencepiece vocabularies write white space."""

_BLANK_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")


@dataclass(frozen=True)
class ControlTokens:
    """A tokenizer's tokens that are no text."""

    bos: int | None
    """BOS, where there is one."""
    adds_bos: bool
    """Whether the tokenizer puts BOS before every text by itself."""
    template_adds_bos: bool
    """Whether the chat template does."""
    ends: tuple[int, ...]
    """What may end an answer: the tokenizer's EOS, the model's, and the chat template's end of a turn."""
    pad: int | None
    """The padding token."""
    specials: tuple[int, ...]
    """All of them, and the unknown token."""
    names: tuple[str, ...]
    """What the special ones are called in text."""
    opening: tuple[int, ...]
    """What the chat template writes before an answer; empty where there is no template or it writes nothing."""


def control_tokens(tokenizer: PreTrainedTokenizerBase, eos: Iterable[int] = ()) -> ControlTokens:
    """Read them off.

    Args:
        tokenizer: the tokenizer that the model is saved with.
        eos: further ids that end an answer, such as those of the model's generation config.
    """
    added = {token: str(entry) for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    specials = {token: name for token, name in (added | named).items() if token is not None}
    bos = tokenizer.bos_token_id
    before, after = _around_an_answer(tokenizer)
    opening = tuple(_ids(tokenizer, before))
    turn = [token for token in _ids(tokenizer, after) if token in specials][:1]
    ends = {tokenizer.eos_token_id, *eos, *turn} - {None}
    return ControlTokens(
        bos=bos,
        adds_bos=bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos],
        template_adds_bos=bool(opening) and "bos_token" in str(tokenizer.chat_template),
        ends=tuple(sorted(ends)),
        pad=tokenizer.pad_token_id,
        specials=tuple(sorted(specials)),
        names=tuple(specials[token] for token in sorted(specials)),
        opening=opening,
    )


def as_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    """``eos_token_id`` of a generation config, which may be one id, several, or none."""
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def without_blanks(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, int | None]:
    """For each token the first of ``ids`` that is the same text but for white space; None for white space alone."""
    first: dict[str, int] = {}
    same: dict[int, int | None] = {}
    for token in ids:
        piece = tokenizer.convert_ids_to_tokens(int(token))
        text = str(piece).translate(_BLANKS).strip() if piece not in _BLANK_BYTES else ""
        same[token] = first.setdefault(text, token) if text else None
    return same


def _around_an_answer(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes right before an answer, white space at its end left off, and right after it."""
    if not tokenizer.chat_template:
        return "", ""
    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        whole = tokenizer.apply_chat_template(talk, tokenize=False)
        asked = tokenizer.apply_chat_template(talk[:1], tokenize=False)
        opened = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):
        return "", ""  # a template for other conversations than these, which says nothing about these rows
    whole, asked, opened = str(whole), str(asked), str(opened)
    before = opened.removeprefix(asked).rstrip() if opened.startswith(asked) else ""
    return before, whole.rpartition(_ANSWER)[2]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
