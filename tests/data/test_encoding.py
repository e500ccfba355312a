"""``data.encoding``: which tokens of a text are learnt, to the character."""

import pytest
from transformers import PreTrainedTokenizerFast

from jebi.data.encoding import Encoder, Tokens, Written


def encoded(tokenizer: PreTrainedTokenizerFast, text: str, *spans: tuple[int, int, float], weight: float = 1) -> Tokens:
    (tokens,) = Encoder(tokenizer).encode([Written(text, False, True, spans, weight)])
    return tokens


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (1, 2), (1, 3), (3, 4), (0, 4), (2, 2)])
def test_a_span_is_learnt_from_its_first_character_to_its_last(
    begin: int, end: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = encoded(tokenizer, "abcd", (begin, end, 1.0))
    assert [label != -100 for label in tokens.labels] == [begin <= place < end for place in range(4)]
    assert [label for label in tokens.labels if label != -100] == tokens.ids[begin:end]


def test_a_character_of_several_tokens_is_learnt_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encoded(tokenizer, "a가b", (1, 2, 1.0))
    assert [label != -100 for label in tokens.labels] == [False, True, True, True, False]


def test_weights_of_answers_and_rows_multiply(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encoded(tokenizer, "abcd", (1, 2, 0.5), (3, 4, 2.0), weight=3).weights == [0, 1.5, 0, 6]
    assert encoded(tokenizer, "abcd", (1, 2, 1.0)).weights == []
    assert encoded(tokenizer, "abcd", (1, 2, 0.5), (3, 4, 1.0)).weights == [0, 0.5, 0, 1]
