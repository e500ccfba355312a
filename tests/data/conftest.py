"""Fixtures of the data room's tests: tokenizers of one token a byte, so that lengths are known, and real ones."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TESTDATA = Path(__file__).resolve().parents[2] / ".testdata"

REAL = ("smollm2", "llama3_1", "qwen3", "gemma3")
"""Tokenizers that tests of templates run on; `make test` fetches them."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets package keeps what it read; not in the user's home, not from one test to the next."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer: Callable[[bool], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing by itself, as SmolLM2's."""
    return byte_tokenizer(False)


@pytest.fixture(scope="session")
def bos_tokenizer(byte_tokenizer: Callable[[bool], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS before every text, as Llama's."""
    return byte_tokenizer(True)


@pytest.fixture(scope="session")
def real_tokenizer(smollm2_folder: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """``real_tokenizer(name)``: one of `REAL`; what a test changes on it, it has to change back."""

    @cache
    def load(name: str) -> PreTrainedTokenizerBase:
        folder = smollm2_folder if name == "smollm2" else TESTDATA / "tokenizers" / name
        if not folder.is_dir():
            pytest.fail(f"{folder} is missing: run make test, or python tests/fetch_tokenizers.py .testdata/tokenizers")
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        loaded.clean_up_tokenization_spaces = False  # Llama's config sets it, with a warning at every decoding
        return loaded

    return load


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """The folder of data sets as people write them."""
    folder = TESTDATA / "rows"
    if not (folder / "fetched").is_file():
        pytest.fail(f"{folder} is missing: run make test, or python tests/fetch_rows.py .testdata/rows")
    return folder
