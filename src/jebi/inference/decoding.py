"""``generate``'s loop of tokens over the engine: what transformers would answer, token by token, sooner.

transformers prepares the call (settings merged and checked, prompts repeated, processors and stopping criteria made)
and keeps it where beams, guessed tokens or a look at scores are asked for. What is left, greedy and sampled answers,
comes here. Logits processors, stopping criteria and streamers are transformers' own and run on the device, those of
the caller too, so that each setting means what it means there and the same seed draws the same tokens.

On a card the next step is on its way before the host looks at a token, so that the card never waits for the host.

Shapes: B rows, S tokens of a left-padded prompt, N tokens of prompt and answer, V vocabulary.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from jebi.inference.engine import Engine
from jebi.models.cache import GrowingCache
from jebi.models.hf import JebiForCausalLM
from jebi.nn.host_copy import HostCopy

_PREPARED = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "inputs_embeds", "tokenizer")
)
"""Keywords that `why_not` looks at, or that concern what is ready by then."""
_PARTS = 128
"""Of a row's scores, of which the highest are looked for beside each other."""
_ONE_BLOCK = range(2**16, 2**17)
"""Vocabularies of which a row gets one block of a card from ``argmax``, and which are long for it: 128,256 scores take
26 us, in parts 13, where 151,936 take 9 and in parts 14 (H200, torch 2.11; where each begins is a guess)."""


class Decoding:
    """What ``JebiForCausalLM.decoding`` is while a model answers."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._lock = threading.Lock()
        """The engine's buffers are one answer's: threads wait for each other."""
        self._thread: int | None = None
        """Which thread has them."""

    def serves(
        self, model: JebiForCausalLM, input_ids: Tensor, config: GenerationConfig, keywords: dict[str, Any]
    ) -> bool:
        """See `models.hf.Decoding`; a streamer that asks the model anew while it is told an answer goes elsewhere."""
        return self._thread != threading.get_ident() and why_not(model, input_ids, config, keywords) is None

    @contextmanager
    def _alone(self, model: JebiForCausalLM) -> Iterator[None]:
        """Within it the engine's buffers are this thread's; as in the model's forward, autocast is kept out."""
        with self._lock, torch.autocast(model.device.type, enabled=False):
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self.engine.release(model)
                self._thread = None

    @torch.no_grad()
    def answer(
        self,
        model: JebiForCausalLM,
        input_ids: Tensor,
        mask_BS: Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: Any,
    ) -> Tensor:
        """Prompts and answers (B, N); rows that ended before others are filled with the pad token."""
        batch, prompt = input_ids.shape
        on_card = model.device.type == "cuda"
        stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        ids_BN = input_ids.new_empty(batch, config.max_length)
        ids_BN[:, :prompt] = input_ids
        going_B = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
        # What the host is told of each token, in one small copy: the tokens, and which rows go on.
        told = HostCopy((2, batch), torch.long, input_ids.device)
        lengths = [prompt] * batch if mask_BS is None else (mask_BS != 0).sum(1).tolist()
        so_far = input_ids
        pad = config._pad_token_tensor
        with self._alone(model):
            logits_BV = self.engine.prefill(model, input_ids, lengths, config.max_length)
            for last in range(prompt, config.max_length):
                # A copy, since processors may write over it.
                # (Typed for a LongTensor, which no operation of torch's gives.)
                scores_BV = processors(so_far, logits_BV.to(torch.float32, copy=True))  # type: ignore[arg-type]
                token_B = _taken(scores_BV, config.do_sample)
                if stops_at_eos and pad is not None:
                    token_B = torch.where(going_B, token_B, pad)
                ids_BN[:, last] = token_B
                so_far = ids_BN[:, : last + 1].contiguous()
                going_B &= ~criteria(so_far, None)
                told.send(torch.stack((token_B, going_B.long())))
                goes_on = last + 1 < config.max_length
                if goes_on and on_card:
                    logits_BV = self.engine.step(model, so_far)
                token_B, goes_B = told.read()
                if streamer is not None:
                    streamer.put(token_B)
                if not goes_B.any():
                    break
                if goes_on and not on_card:
                    logits_BV = self.engine.step(model, so_far)
            if streamer is not None:
                streamer.end()
            return so_far


def _taken(scores_BV: Tensor, do_sample: bool) -> Tensor:
    """The best token of each row, or one drawn as transformers draws it."""
    if do_sample:
        return torch.multinomial(scores_BV.softmax(-1), num_samples=1).squeeze(1)
    vocabulary = scores_BV.shape[-1]
    parted = scores_BV.is_cuda and vocabulary in _ONE_BLOCK and vocabulary % _PARTS == 0
    return _best_of_parts(scores_BV) if parted else scores_BV.argmax(-1)


def _best_of_parts(scores_BV: Tensor) -> Tensor:
    """``argmax`` in two steps."""
    tops, places = scores_BV.unflatten(-1, (_PARTS, -1)).max(-1)
    part_B1: Tensor = tops.argmax(-1, keepdim=True)
    best_B1: Tensor = part_B1 * (scores_BV.shape[-1] // _PARTS) + places.gather(-1, part_B1)
    return best_B1.squeeze(-1)


def why_not(
    model: JebiForCausalLM, input_ids: Tensor, config: GenerationConfig, keywords: dict[str, Any]
) -> str | None:
    """Why a call goes through transformers' own loop; None where the engine serves it."""
    mask_BS, positions_BS = keywords.get("attention_mask"), keywords.get("position_ids")
    if any(layer.answering is None for layer in model.model.decoder_layers()):
        return "its layers are none that are laid together: DoRA, trained weights, or an adapter put on later"
    if input_ids.device != model.device:
        return "the prompts are on another device than the model"
    if keywords.get("inputs_embeds") is not None or not 0 < input_ids.shape[1] < config.max_length:
        return "there are no tokens to begin with, or none to make"
    if config.return_dict_in_generate:
        return "more is asked for than tokens"
    if config.use_cache is False or config.cache_implementation is not None or config.prefill_chunk_size:
        return "another cache is asked for, none, or prompts in chunks"
    if config.is_assistant:
        return "it guesses tokens for another model, which wants its cache"
    cache = keywords.get("past_key_values")
    if cache is not None and not (isinstance(cache, GrowingCache) and cache.of_generate):
        return "a cache was given"
    if given := [name for name, value in keywords.items() if name not in _PREPARED and value is not None]:
        return f"the model is given {', '.join(given)}"
    if mask_BS is not None and (mask_BS.shape != input_ids.shape or not _padded_left(mask_BS)):
        return "padding stands elsewhere than in front of rows"
    if positions_BS is not None and not _usual(positions_BS, mask_BS):
        return "positions are given that do not count a row's tokens"
    return None


def _padded_left(mask_BS: Tensor) -> bool:
    seen_BS = mask_BS != 0
    return bool((seen_BS[:, -1].all() & (seen_BS[:, 1:] >= seen_BS[:, :-1]).all()).item())


def _usual(positions_BS: Tensor, mask_BS: Tensor | None) -> bool:
    """Whether positions count each row's tokens from 0."""
    if mask_BS is None:
        usual_BS = torch.arange(positions_BS.shape[1], device=positions_BS.device).expand_as(positions_BS)
        return torch.equal(positions_BS, usual_BS)
    seen_BS = mask_BS != 0
    usual_BS = seen_BS.long().cumsum(-1) - 1
    return positions_BS.shape == usual_BS.shape and torch.equal(positions_BS[seen_BS], usual_BS[seen_BS])
