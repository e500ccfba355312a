"""A conversation with a model: what was said before goes into the next prompt, as far as template and length allow.

Printing and commands are ``jebi chat``'s.
"""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from jebi.data.chat_template import ChatTemplate
from jebi.data.conversation import Conversation, Turn
from jebi.data.encoding import Encoder
from jebi.data.templates import Template
from jebi.errors import DataError
from jebi.inference.generation import generate
from jebi.models.hf import JebiForCausalLM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Said:
    """An answer, and how fast it came."""

    text: str
    """Without special tokens."""
    tokens: int
    """Of the answer, its end included."""
    first_s: float
    """Seconds to its first token."""
    tokens_per_s: float
    """Of the tokens behind the first; of the first where there are no others."""


class Talk:
    """Questions to one model, whose adapter may be off for some of them."""

    def __init__(
        self, model: JebiForCausalLM, tokenizer: PreTrainedTokenizerBase, template: Template, max_new_tokens: int
    ):
        """Nothing has been said yet; templates with a place for one question remember none.

        Args:
            model: ready for inference.
            tokenizer: its tokenizer.
            template: how turns become a prompt.
            max_new_tokens: where an answer is cut.
        """
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._encoder = Encoder(tokenizer, template.literals)
        self._most = max_new_tokens
        self._remembers = isinstance(template, ChatTemplate)
        self._turns: tuple[Turn, ...] = ()

    def forget(self) -> None:
        """Begin anew."""
        self._turns = ()

    def ask(self, question: str, tuned: bool, stream: bool = True) -> Said:
        """The answer, printed to stdout as it comes where ``stream``; the adapter takes part if ``tuned``.

        Raises:
            DataError: the template cannot write the question, or writes nothing.
        """
        asked = Turn("user", question)
        ids = torch.tensor([self._prompt(asked)], device=self._model.device)
        clock = _Clock(self._tokenizer, stream)
        with torch.no_grad(), nullcontext() if tuned else self._model.disable_adapter():
            output = generate(
                self._model,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=clock,
                max_new_tokens=self._most,
                do_sample=False,
            )
        answer = output[0, ids.shape[1] :]
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True)).strip()
        if self._remembers:
            self._turns = (*self._turns, asked, Turn("assistant", text))
        first_s, rest_s = clock.seconds()
        made = len(answer)
        return Said(text, made, first_s, (made - 1) / rest_s if made > 1 else 1 / first_s)

    def _prompt(self, asked: Turn) -> list[int]:
        """Token ids; the oldest questions and their answers are forgotten where all are too long."""
        longest = getattr(self._model, "max_seq_length", 2048)
        while True:
            (ids,) = self._encoder.prompts(self._template, [Conversation((*self._turns, asked))])
            if not ids:
                raise DataError("the template writes nothing for this question: does it name role and content?")
            if not self._turns or len(ids) + self._most <= longest:
                if len(ids) > longest:
                    logger.warning(f"that are {len(ids):,} tokens, of which the model was made for {longest:,}")
                return ids
            self._turns = self._turns[2:]


class _Clock(TextStreamer):
    """Prints as `TextStreamer` does, and notes when the first token came and the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prints: bool):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._prints = prints
        self._marks: list[float] = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            # The prompt's mark, the first token's, the last one's.
            self._marks = [*self._marks[:2], time.perf_counter()]
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._prints:
            super().on_finalized_text(text, stream_end)

    def seconds(self) -> tuple[float, float]:
        """To the first token, and from there to the last."""
        marks: list[Any] = [*self._marks, self._marks[-1]]
        return marks[1] - marks[0], marks[2] - marks[1]
