"""The settings of a run: one dataclass a section, a docstring a field. The only reader of YAML and of ``--set``.

Modules take plain values; these objects stop at the builders (`fast`, `training.run`, `cli`). No torch here.
"""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from jebi.errors import ConfigError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a layer, all adapted by default."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every projection but the head."""

Storage = Literal["dense", "nf4", "int8", "masters"]
"""How the layers' projections are held: in the compute dtype, in 4 bits, in 8, or trained, as float32."""


@dataclass
class ModelConfig:
    """Which model, and how it is held in memory."""

    name: str = "smollm2"
    """``smollm2`` (comes with the demo), a folder, a .gguf file, or a hub id."""
    max_seq_length: int = 2048
    """Longest row in tokens; beyond the model's own length RoPE is scaled."""
    load_in_4bit: bool | None = None
    """Store the layers' projections as NF4 with double quantisation; null does, unless `load_in_8bit` is set."""
    load_in_8bit: bool = False
    """Store them in 8 bits, in blocks of 64."""
    full_finetuning: bool = False
    """Train every weight instead of an adapter; they are float32 and cast to `dtype` where they are used."""
    dtype: str | None = None
    """float32, bfloat16, float16, or null to detect."""
    token: str | None = None
    """Hub token for gated models."""
    rope_scaling: dict[str, Any] | None = None
    """How RoPE is scaled, such as {rope_type: yarn, factor: 4.0}; null carries the model's own scaling on."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.max_seq_length < 1:
            raise ConfigError(f"max_seq_length must be at least 1, not {self.max_seq_length}; 2048 is usual.")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16, float16 or null, not '{self.dtype}'.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit exclude each other: drop one.")
        if self.full_finetuning and (self.load_in_4bit or self.load_in_8bit):
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ConfigError(
                f"full_finetuning trains the weights themselves, which have no bits to spare: drop {name}."
            )

    @property
    def storage(self) -> Storage:
        """How the layers' projections are held."""
        if self.full_finetuning:
            return "masters"
        if self.load_in_8bit:
            return "int8"
        return "dense" if self.load_in_4bit is False else "nf4"


@dataclass
class LoraConfig:
    """The adapter."""

    r: int = 16
    """Rank of the two matrices; 8 to 128 is usual."""
    lora_alpha: float = 16
    """Numerator of the scale: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs dropped in training; 0 is the fast path."""
    target_modules: list[str] | str = field(default_factory=lambda: list(TARGET_MODULES))
    """Projections that get an adapter: names, ``all-linear``, or a regular expression of whole paths."""
    exclude_modules: list[str] | str | None = None
    """Projections that get none after all: names, or a regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Layers whose projections are adapted; all when null."""
    layers_pattern: list[str] | str | None = None
    """What the list of layers is called in the model; anything when null."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some projections, by name or regular expression of a path's end."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other numerators of the scale, likewise."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained along: none, every one of the model, or those of adapted projections."""
    use_rslora: bool = False
    """Rank-stabilised scale (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the length of each row of the adapted weight as well (arXiv:2402.09353)."""
    init_lora_weights: bool | str = True
    """How it starts: true, ``gaussian``, ``pissa``, ``pissa_niter_16`` (arXiv:2404.02948), ``loftq`` (2310.08659)."""
    loftq_config: dict[str, int] | None = None
    """``loftq_bits`` (4) and ``loftq_iter`` (rounds, 1); to set it is to start with LoftQ."""
    modules_to_save: list[str] | None = None
    """Modules trained wholly, such as embed_tokens and lm_head."""
    random_state: int = 3407
    """Seed of the first matrices."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.r < 1:
            raise ConfigError(f"r must be a whole number above 0, not {self.r}; 8, 16, 32, 64 or 128 are usual.")
        if not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(f"lora_alpha must be a number above 0, not {self.lora_alpha!r}; r or 2 r is usual.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be from 0 to below 1, not {self.lora_dropout}.")
        if not self.target_modules:
            raise ConfigError(f"target_modules is empty; name at least one of {', '.join(TARGET_MODULES)}.")
        self._check_layers()
        self._check_start()

    def _check_layers(self) -> None:
        expression = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        if expression and self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform needs names in target_modules: put layers into the expression.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern does nothing without layers_to_transform: set both or neither.")
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank_pattern: '{name}' must have a whole number above 0, not {rank!r}.")
        for name, alpha in self.alpha_pattern.items():
            if not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
                raise ConfigError(f"alpha_pattern: '{name}' must have a number above 0, not {alpha!r}.")
        for name in ("target_modules", "exclude_modules"):
            _check_pattern(getattr(self, name), name)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            _check_pattern(pattern, "rank_pattern or alpha_pattern")

    def _check_start(self) -> None:
        if self.loftq_config and self.init_lora_weights is True:
            self.init_lora_weights = "loftq"
        start = self.init_lora_weights
        known = start is True or start in ("gaussian", "pissa", "loftq")
        if not known and not (isinstance(start, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", start)):
            raise ConfigError(
                "init_lora_weights must be True, 'gaussian', 'pissa', 'pissa_niter_N' with a number N, or 'loftq', "
                f"not {start!r}."
            )
        if start != "loftq":
            if self.loftq_config:
                raise ConfigError(f"loftq_config does nothing with init_lora_weights={start!r}: drop one of them.")
            return
        settings = {"loftq_bits": 4, "loftq_iter": 1} | (self.loftq_config or {})
        reject_unknown(settings, {"loftq_bits", "loftq_iter"}, "loftq_config.")
        if settings["loftq_bits"] != 4:
            raise ConfigError(f"loftq_bits must be 4, not {settings['loftq_bits']}: jebi's 4-bit format is NF4.")
        if not isinstance(settings["loftq_iter"], int) or settings["loftq_iter"] < 1:
            raise ConfigError(f"loftq_iter must be a whole number above 0, not {settings['loftq_iter']!r}.")
        self.loftq_config = settings

    def rank_of(self, path: str) -> int:
        """The rank of the projection at ``path``, as PEFT finds it."""
        return next((rank for name, rank in self.rank_pattern.items() if _ends(name, path)), self.r)

    def scale_of(self, path: str) -> float:
        """What the product of that projection's matrices is multiplied by."""
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if _ends(name, path)), self.lora_alpha)
        rank = self.rank_of(path)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def _ends(pattern: str, path: str) -> bool:
    """PEFT's rule for the keys of its patterns."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _check_pattern(pattern: list[str] | str | None, name: str) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{name} '{pattern}' is no regular expression: {error}.") from error


@dataclass
class DataConfig:
    """The rows."""

    train: str = ""
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    split: str = "train"
    """Split of a hub data set."""
    heldout: str | None = None
    """A file of rows that are never trained on, for the held-out loss."""
    heldout_share: float = 0.0
    """Without `heldout`, the share of the training rows set aside for it."""
    template: str | None = None
    """``tutorial`` (Korean, the default), ``alpaca`` (English), or a text with {instruction}, {input}, {output}."""
    text_field: str | None = None
    """Column that holds whole ready texts; the template is not used then."""
    learn: Literal["all", "answers"] = "all"
    """What has labels: the whole text, as in the tutorial, or only the answers and their EOS."""
    packing: bool = False
    """Fill sequences of max_seq_length with several rows, kept apart."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is missing: name a .jsonl file or a hub data set.")
        if self.text_field and self.template:
            raise ConfigError("data.template does nothing beside data.text_field, whose texts are ready: drop one.")
        if self.text_field and self.learn == "answers":
            raise ConfigError("data.learn 'answers' needs the answers apart: use a template, not data.text_field.")
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"data.heldout_share must be from 0 to below 1, not {self.heldout_share}.")


@dataclass
class RunConfig:
    """A whole run, as a YAML file holds it."""

    model: ModelConfig
    """The model."""
    lora: LoraConfig
    """The adapter."""
    data: DataConfig
    """The rows."""
    train: dict[str, Any]
    """Fields of transformers.TrainingArguments and of jebi's own `SFTConfig`."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``2e-4`` for a text; here it is the number that it is everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def read_run(path: Path, settings: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply ``section.key=value`` settings over it.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown, or a value has the wrong type.
    """
    try:
        document = _load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config '{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"config '{path}' must hold sections: model, lora, data, train.")
    for setting in settings or []:
        _apply(document, setting)
    return run_from_dict(document)


def run_from_dict(document: dict[str, Any]) -> RunConfig:
    """Build a run from nested dictionaries, as YAML yields them."""
    known = {"model": ModelConfig, "lora": LoraConfig, "data": DataConfig}
    reject_unknown(document, {*known, "train"}, "")
    sections = {name: _section(cls, document.get(name) or {}, name) for name, cls in known.items()}
    if sections["model"].full_finetuning and sections["lora"] != LoraConfig():
        raise ConfigError("model.full_finetuning trains every weight and no adapter: drop it or section 'lora'.")
    train = document.get("train") or {}
    if not isinstance(train, dict):
        raise ConfigError("section 'train' must hold settings, one a line.")
    return RunConfig(**sections, train=dict(train))


def _apply(document: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    section, dot, name = key.partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set '{setting}' must be section.key=value, such as --set lora.r=32.")
    target = document.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"--set '{setting}': section '{section}' holds no settings.")
    try:
        target[name] = _load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set '{setting}': the value is not YAML; put it in quotes.") from error


def _section(cls: type, values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"section '{name}' must hold settings, one a line.")
    fields = {f.name for f in dataclasses.fields(cls)}
    reject_unknown(values, fields, f"{name}.")
    hints = typing.get_type_hints(cls)
    checked = {key: _typed(hints[key], value, f"{name}.{key}") for key, value in values.items()}
    return cls(**checked)


def reject_unknown(values: dict[str, Any], known: set[str], prefix: str) -> None:
    """`ConfigError` for the first key that is not known, with the nearest that is."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean '{prefix}{near[0]}'?" if near else f" Known: {', '.join(sorted(known))}."
            raise ConfigError(f"setting '{prefix}{key}' is unknown.{hint}")


def _check_fields(section: Any) -> None:
    """`ConfigError` unless every field of a section has its type."""
    hints = typing.get_type_hints(type(section))
    for found in dataclasses.fields(section):
        _typed(hints[found.name], getattr(section, found.name), found.name)


def check_type(hint: Any, value: Any, name: str) -> None:
    """`ConfigError` unless the value has the hinted type; a hint that is no class or union of classes passes."""
    if hint is not Any and all(isinstance(typing.get_origin(option) or option, type) for option in _options(hint)):
        _typed(hint, value, name)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _typed(hint: Any, value: Any, name: str) -> Any:
    """``value`` if it has the hinted type; whole numbers serve as floats."""
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, typing.get_args(hint)))}, not {value!r}.")
        return value
    options = _options(hint)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    names = " or ".join("null" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{name} must be {names}, not {value!r}.")
