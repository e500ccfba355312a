"""Special tokens written inside a row's own text: kept text, unless the user asks for something else.

"<|im_end|>" typed into a question is eight characters of a question. Tokenisers turn it into the token that ends a
turn, and whoever writes the rows then writes the template. Here such texts take the place of stand-ins of equal length
while a template is rendered. Then the template's own tokens get other stand-ins, the row's texts come back, and a copy
of the tokenizer that knows its special tokens by those stand-ins alone encodes the whole. So every other token is what
it would have been, and offsets hold.
"""

import json
import re
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from jebi.data.conversation import Conversation, Role
from jebi.errors import ConfigError, DataError

Policy = Literal["text", "tokens", "error"]
"""What becomes of them: ordinary text; the tokens they name; an error that names the row."""

_FIRST = 0x100000
"""Code points of the last private plane, two for each special token."""

_PRIVATE = re.compile("[\U00100000-\U0010ffff]")


class SpecialTokens:
    """The strings that a tokenizer takes for control tokens, and how to keep a row's own apart from a template's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, literals: str, policy: Policy):
        """``literals``: what the template may write; added tokens in it control the model even where not special."""
        added = tokenizer.added_tokens_decoder
        special = [str(token.content) for token in added.values() if token.special]
        written = [
            str(token.content)
            for token in added.values()
            if not token.special and token.content in literals and not token.content.isspace()
        ]
        self.policy = policy
        self._tokenizer = tokenizer
        self._names = sorted({*special, *written}, key=lambda name: (-len(name), name))
        self._special = _pattern(special)
        self._any = _pattern(self._names)
        self._copy: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_copy": None}  # another process makes its own where it needs one

    def hide(self, row: Conversation) -> Conversation:
        """The row with stand-ins where its texts hold control tokens; the same row where they hold none.

        Answers may hold those that are not special, such as <think>: the model is to write them.

        Raises:
            DataError: they hold one and the policy is ``error``.
        """
        if self.policy == "tokens":
            return row
        found = False

        def change(text: str, role: Role) -> str:
            nonlocal found
            hidden = self.hide_text(text, self._special if role == "assistant" else self._any)
            found = found or hidden != text
            return hidden

        hidden = row.map_texts(change)
        return hidden if found else row

    def hide_text(self, text: str, pattern: re.Pattern[str] | None = None) -> str:
        """A text with stand-ins for control tokens; all of them without ``pattern``."""
        found = (pattern or self._any).search(text)
        if found is None or self.policy == "tokens":
            return text
        if self.policy == "error":
            raise DataError(
                f"the text holds the special token {found[0]!r}: take it out, or set data.special_tokens_in_text: text "
                "(kept as ordinary text) or tokens (the token itself)."
            )
        if _PRIVATE.search(text):
            raise DataError(f"the text holds {found[0]!r} and characters of Unicode's last private plane; drop either.")
        return (pattern or self._any).sub(lambda match: self._stand_in(match[0], of_row=True), text)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a rendered text with stand-ins: what they stand for as text, all else as ever."""
        if self._copy is None:
            self._copy = self._without_names()
        text = self._any.sub(lambda match: self._stand_in(match[0], of_row=False), text)
        back = {self._stand_in(name, of_row=True): name for name in self._names}
        text = _pattern(list(back)).sub(lambda match: back[match[0]], text)
        encoding = self._copy.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _stand_in(self, name: str, of_row: bool) -> str:
        return chr(_FIRST + 2 * self._names.index(name) + of_row) * len(name)

    def _without_names(self) -> Tokenizer:
        """The tokenizer with its control tokens called by their stand-ins, their ids as before."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                "special tokens in the rows' texts can be kept text with a fast tokenizer alone: "
                "set data.special_tokens_in_text: error or tokens."
            )
        parts = json.loads(backend.to_str())
        renamed = {name: self._stand_in(name, of_row=False) for name in self._names}
        for token in parts["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        vocabulary = parts["model"].get("vocab")
        if isinstance(vocabulary, dict):
            parts["model"]["vocab"] = {renamed.get(token, token): number for token, number in vocabulary.items()}
        elif isinstance(vocabulary, list):  # unigram: pairs of token and score
            parts["model"]["vocab"] = [[renamed.get(token, token), score] for token, score in vocabulary]
        parts["post_processor"] = parts["truncation"] = parts["padding"] = None
        copy = Tokenizer.from_str(json.dumps(parts, ensure_ascii=False))
        for name, stand_in in renamed.items():
            assert copy.token_to_id(stand_in) == backend.token_to_id(name), f"{name} has another id in the copy"
        return copy


def _pattern(names: list[str]) -> re.Pattern[str]:
    """Any of the names, the longest first; nothing where there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
