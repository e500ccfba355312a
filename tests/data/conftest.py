"""Fixtures of the data room's tests: tokenizers of one token a byte, so that lengths are known beforehand."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer: Callable[[bool], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing by itself, as SmolLM2's."""
    return byte_tokenizer(False)


@pytest.fixture(scope="session")
def bos_tokenizer(byte_tokenizer: Callable[[bool], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, as Llama's."""
    return byte_tokenizer(True)
