"""Written rows to token ids, and which of the tokens are learnt, how much.

BOS and EOS are added once: where the tokenizer adds its own and the text has it already, the text's stays alone.

A token belongs to an answer when it begins at or behind the answer's first character and before its end. One that
straddles the beginning holds a piece of the prompt, which the model is never asked to write, and is not learnt.

Shapes: T tokens of a row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation
from jebi.data.special_tokens import Policy, SpecialTokens
from jebi.data.templates import Template
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Written:
    """A row's text, ready to be tokenised."""

    text: str
    """What the template wrote, or a ready text."""
    hidden: bool
    """Whether stand-ins in it hide special tokens of the row's own."""
    whole: bool
    """Whether BOS and EOS are in it, so that the tokenizer adds none."""
    spans: tuple[tuple[int, int, float], ...] | None = None
    """Beginning, end and weight of what is learnt; None learns everything."""
    weight: float = 1.0
    """How much the row counts."""


@dataclass(frozen=True)
class Tokens:
    """A row's tokens."""

    ids: list[int]
    """(T,) token ids."""
    labels: list[int]
    """(T,) the ids of tokens that are learnt, -100 elsewhere."""
    weights: list[float]
    """(T,) how much each token's loss counts; empty where all count once."""


class Encoder:
    """Texts to tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, literals: str = "", policy: Policy = "text"):
        """``literals``: what the template may write; ``policy``: what special tokens in the rows' texts become."""
        self.tokenizer = tokenizer
        self.special = SpecialTokens(tokenizer, literals, policy)
        self._before, self._after = _affixes(tokenizer)

    def encode(self, rows: list[Written]) -> list[Tokens]:
        """Tokenise rows together."""
        plain = [row.text for row in rows if not row.hidden]
        needs_offsets = any(row.spans is not None for row in rows)
        encodings = iter(self._encode_plain(plain, needs_offsets))
        made = []
        for row in rows:
            ids, offsets = self.special.encode(row.text) if row.hidden else next(encodings)
            made.append(self._tokens(row, ids, offsets))
        return made

    def prompts(self, template: Template, conversations: list[Conversation]) -> list[list[int]]:
        """Token ids of prompts, made as training rows are; no EOS ends them."""
        hidden = [self.special.hide(row) for row in conversations]
        texts = [
            Written(template.prompt(shown), shown is not row, whole=True) for shown, row in zip(hidden, conversations)
        ]
        rows = self.encode(texts)
        return [row.ids if template.whole else [*self._lacking(row.ids), *row.ids] for row in rows]

    def _encode_plain(self, texts: list[str], needs_offsets: bool) -> list[tuple[list[int], Any]]:
        if not texts:
            return []
        if needs_offsets and not self.tokenizer.is_fast:
            raise ConfigError("answers can be told apart with a fast tokenizer alone: set data.learn: all.")
        batch = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        if not needs_offsets:
            return [(ids, None) for ids in batch["input_ids"]]
        return [(ids, encoding.offsets) for ids, encoding in zip(batch["input_ids"], batch.encodings)]

    def _tokens(self, row: Written, ids: list[int], offsets: Any) -> Tokens:
        before = [] if row.whole else self._lacking(ids)
        after = [] if row.whole or ids[-len(self._after) :] == self._after else self._after
        if row.spans is None:
            whole = [*before, *ids, *after]
            if row.weight == 1.0:
                return Tokens(whole, whole, [])
            return _weighed(whole, np.full(len(whole), row.weight, dtype=np.float32))
        weights = np.zeros(len(before) + len(ids) + len(after), dtype=np.float32)
        starts = _starts(offsets)
        for begin, end, weight in row.spans:
            first, last = np.searchsorted(starts, (begin, end))
            weights[len(before) + first : len(before) + last] = weight * row.weight
        return _weighed([*before, *ids, *after], weights)

    def _lacking(self, ids: list[int]) -> list[int]:
        """What the tokenizer puts before a text that has it not yet."""
        return [] if ids[: len(self._before)] == self._before else self._before


def _weighed(ids: list[int], weights: Weights) -> Tokens:
    labels = [token if weight else IGNORED for token, weight in zip(ids, weights.tolist())]
    return Tokens(ids, labels, weights.tolist() if np.any((weights != 0) & (weights != 1)) else [])


def _starts(offsets: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """(T,) each token's first character, never falling.

    Some tokenizers leave a token's leading spaces out of its offsets; it begins where the one before ends.
    """
    bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts = bounds[:, 0].copy()
    starts[1:] = np.minimum(starts[1:], bounds[:-1, 1])
    if len(starts):
        starts[0] = 0
    return np.maximum.accumulate(starts)


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer adds before and behind every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise DataError("the tokenizer makes other tokens of a text when it adds its special ones; use another.")
