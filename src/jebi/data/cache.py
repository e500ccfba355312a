"""Where tokenised rows are kept, under a name that changes with everything that changes them.

The datasets package would name them by a hash of the mapping function, which changes where nothing did (a tokenizer's
padding state) and stays where something did (a function that a function calls). Here the name is made of what the rows
are made of: the rows, the tokenizer, the template, and every setting. A function of the user's can hide anything, so
what it makes is never taken from the cache.
"""

import hashlib
import json
import secrets
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from jebi.data.writing import ConversationWriter, TextWriter

FEWEST_ROWS = 1000
"""Fewer rows are tokenised in less time than a user would look for their cache; they leave no file."""


def place(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, made_by: ConversationWriter | TextWriter | int
) -> dict[str, Any]:
    """Arguments of `Dataset.map` that say where its result lies.

    Args:
        dataset: the rows.
        tokenizer: what makes tokens of them.
        made_by: what writes them; of token ids their greatest length alone.
    """
    by_function = not isinstance(made_by, int) and made_by.how.formatting_func is not None
    if len(dataset) < FEWEST_ROWS or by_function or not datasets.is_caching_enabled():
        # Named by chance, since the package would hash the function for a name, tokenizer and all.
        return {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": secrets.token_hex(16)}
    name = fingerprint(dataset, tokenizer, made_by)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "jebi"
    folder.mkdir(parents=True, exist_ok=True)
    return {"new_fingerprint": name, "cache_file_name": str(folder / f"{name}.arrow"), "load_from_cache_file": True}


def fingerprint(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, made_by: ConversationWriter | TextWriter | int
) -> str:
    """A name for the tokens of these rows, 32 hexadecimal digits."""
    parts: list[Any] = [_of_code(), _of_rows(dataset), _of_tokenizer(tokenizer)]
    if isinstance(made_by, int):
        parts.append(made_by)
    else:
        how = made_by.how
        parts += [(field.name, repr(getattr(how, field.name))) for field in fields(how) if field.name != "workers"]
    writer = made_by.behind if isinstance(made_by, TextWriter) else made_by
    if isinstance(writer, ConversationWriter):
        parts += [writer.form.name, writer.template.spec, writer.template.literals]
        if "strftime_now" in writer.template.literals:
            parts.append(date.today().isoformat())
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:32]


def _of_code() -> list[str]:
    """What turns rows into tokens: this room's own text, and the packages that render and tokenise."""
    hasher = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(path.read_bytes())
    return [hasher.hexdigest(), transformers.__version__, tokenizers.__version__]


def _of_rows(dataset: Dataset) -> str:
    """A hash of what the rows hold; a data set's own fingerprint follows from where they came from."""
    hasher = hashlib.sha256(json.dumps([dataset.column_names, str(dataset.features)]).encode())
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            hasher.update(batch.serialize())
    return hasher.hexdigest()


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        whole = backend.to_str()
        text = whole[whole.index('"added_tokens"') :]  # before it stand padding and truncation, which each call sets
    splits = getattr(tokenizer, "split_special_tokens", False)
    settings = [text, tokenizer.special_tokens_map, type(tokenizer).__name__, splits]
    return hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()
