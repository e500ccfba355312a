"""The settings of a run: one dataclass a section, a docstring a field. YAML and ``--set`` are `reading`'s.

Modules take plain values; these objects stop at the builders (`fast`, `run`, `cli`). No torch here.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from jebi.config.checking import check_fields, reject_unknown
from jebi.errors import ConfigError, ModelError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven projections of a layer, all adapted by default."""

ALL_LINEAR = "all-linear"
"""PEFT's word for every projection but the head."""

Compute = Literal["auto", "fp8", "fp8_backward"]
"""What multiplies by the frozen base in training: the compute dtype, or 8-bit floats."""

Storage = Literal["dense", "nf4", "int8", "masters"]
"""How the layers' projections are held: in the compute dtype, in 4 bits, in 8, or trained, as float32."""

Checkpointing = Literal["none", "keep_attention", "recompute", "offload"]
"""Keep every layer's activations; recompute them from the layer's input and attention's output; from the input alone;
from input and attention's output, both in host memory."""

EmbeddingPlace = Literal["auto", "card", "host"]
"""Where the embedding's table is. "auto" is the card, until a training needs its memory for something else."""

HeadPlace = Literal["auto", "card", "host", "int8", "nf4"]
"""Where the head is, or how it is held on the card; "auto" likewise, which never quantises it."""


@dataclass(frozen=True)
class Places:
    """Where the two large tables beside the layers are."""

    embedding: EmbeddingPlace = "auto"
    """The embedding's."""
    head: HeadPlace = "auto"
    """The head's."""

    def settled(self, tied: bool, on_card: bool) -> "Places":
        """With nothing left open: one table for both is where either is asked for; without a card there is one place.

        Args:
            tied: whether embedding and head are one table, unless the head is quantised.
            on_card: whether there is a card.

        Raises:
            ModelError: one table is asked for in two places.
        """
        embedding, head = self.embedding, self.head
        quantised = head in ("int8", "nf4")
        if tied and not quantised and "host" in (embedding, head):
            if "card" in (embedding, head):
                raise ModelError(
                    f"this model's head is its embedding, one table, which embedding='{embedding}' and head='{head}' "
                    "put in two places: set one of them to 'auto'."
                )
            embedding = head = "host"
        if not on_card:
            return Places("card", head if quantised else "card")
        return Places("host" if embedding == "host" else "card", "card" if head == "auto" else head)


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
    embedding: EmbeddingPlace = "auto"
    """Where a frozen embedding is while a card computes: auto, card, or host (the card reads single rows)."""
    head: HeadPlace = "auto"
    """Where a frozen output head is: auto, card, host (copied over in slices), or quantised on the card: int8, nf4."""
    compute: Compute = "auto"
    """How the frozen base is multiplied while training: ``auto`` in `dtype`; ``fp8`` in 8-bit floats, faster and less
    exact (docs/how-it-works.md), on compute capability 9.0 and newer; ``fp8_backward`` in the backward alone, which
    gains less and leaves the loss as it is."""
    shard: bool = False
    """Divide the frozen layers among the processes of a machine, where one card does not hold them."""

    def __post_init__(self) -> None:
        check_fields(self)
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
        if self.full_finetuning and self.compute != "auto":
            raise ConfigError(
                f"compute '{self.compute}' multiplies a frozen base, and full_finetuning leaves none: drop one."
            )
        if self.shard and self.full_finetuning:
            raise ConfigError("shard divides frozen weights, and full_finetuning trains all of them: drop one.")
        if self.shard and self.compute != "auto":
            raise ConfigError(
                f"compute '{self.compute}' needs whole layers, which no process has under shard: drop one."
            )
        if self.full_finetuning and (self.embedding not in ("auto", "card") or self.head not in ("auto", "card")):
            raise ConfigError("full_finetuning trains embedding and head, on the card: leave both 'auto'.")

    @property
    def places(self) -> Places:
        """Where embedding and head are to be."""
        return Places(self.embedding, self.head)

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
        check_fields(self)
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

    @property
    def pissa(self) -> bool:
        """Whether it starts with PiSSA, by whatever decomposition."""
        return str(self.init_lora_weights).startswith("pissa")

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
    """The rows. docs/data.md shows every setting."""

    train: str | list[Any] = ""
    """A .jsonl, .json, .csv or .parquet file, a folder of them, a hub id; or a list, also of {source, weight}."""
    split: str = "train"
    """Split of a hub data set."""
    heldout: str | list[Any] | None = None
    """Rows that are never trained on, for the held-out loss; as `train`."""
    heldout_share: float = 0.0
    """Without `heldout`, the share of each source's rows set aside for it."""
    streaming: bool = False
    """Read the training rows while training, never holding them all; needs train.max_steps."""
    shuffle_buffer: int = 1000
    """Rows of a stream among which the next is drawn; 1 keeps their order."""
    format: str | None = None
    """text, alpaca, prompt_completion, messages or sharegpt; null recognises it by the columns."""
    formatter: str | None = None
    """The user's own: file.py:function, or a Jinja text of the columns."""
    roles: dict[str, Any] = field(default_factory=dict)
    """What further roles in messages mean, such as {narrator: user}."""
    bad_rows: Literal["error", "skip"] = "error"
    """What becomes of rows that cannot be read."""
    template: str | None = None
    """tutorial, alpaca, chat (the tokenizer's), bare, a text with {instruction}, {input}, {output}, or a Jinja chat
    template; null is tutorial for Alpaca's columns and chat for conversations."""
    text_field: str | None = None
    """Column that holds whole ready texts; the template is not used then."""
    learn: Literal["auto", "all", "answers", "last_answer"] = "auto"
    """What has labels: the whole text, as in the tutorial; the answers and their ends; the last of them. auto is all,
    but of prompt and completion the completion."""
    special_tokens_in_text: Literal["auto", "text", "tokens", "error"] = "auto"
    """What special tokens written inside the rows become; auto is text, and tokens in ready texts."""
    packing: bool = False
    """Fill sequences of max_seq_length with several rows, kept apart."""
    long: Literal["cut", "split", "refuse"] = "cut"
    """A row longer than max_seq_length is cut, split into pieces, or refused by its number."""
    overlap: int = 0
    """Tokens, one at least, that a piece repeats of the piece before it to read, not to learn; with `long` split."""
    repair_encoding: bool = False
    """Turn back text that was read in the wrong encoding, such as Ã© for é."""
    allow: list[str] = field(default_factory=list)
    """Codes of the check that shall not stop the training; docs/checks.md has them."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is missing: name a .jsonl file or a hub data set.")
        if self.text_field and self.template:
            raise ConfigError("data.template does nothing beside data.text_field, whose texts are ready: drop one.")
        if self.text_field and self.format not in (None, "text"):
            raise ConfigError(f"data.text_field names ready texts, but data.format is {self.format}: drop one.")
        if self.text_field and self.learn in ("answers", "last_answer"):
            raise ConfigError(
                f"data.learn '{self.learn}' needs the answers apart: use a template, not data.text_field."
            )
        if not 0 <= self.heldout_share < 1:
            raise ConfigError(f"data.heldout_share must be from 0 to below 1, not {self.heldout_share}.")
        if self.overlap and self.long != "split":
            raise ConfigError(f"data.overlap does nothing with data.long {self.long}: set data.long to split.")
        if self.heldout_share and self.streaming:
            raise ConfigError("data.heldout_share needs rows that can be counted: set data.heldout beside streaming.")
        if self.shuffle_buffer < 1:
            raise ConfigError(f"data.shuffle_buffer must be at least 1, not {self.shuffle_buffer}.")


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
