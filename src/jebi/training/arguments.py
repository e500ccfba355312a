"""The trainer's settings: transformers' `TrainingArguments` with jebi's own beside them.

Every field of `TrainingArguments` either works or is refused here by name; none is ignored in silence.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from jebi.data.findings import require_codes
from jebi.data.long_rows import require_choice
from jebi.data.preparation import Learn
from jebi.errors import ConfigError


@dataclass
class SFTConfig(TrainingArguments):
    """`TrainingArguments` and what the script passes to `SFTTrainer` directly, in one object."""

    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the rows' texts."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest row; None takes the model's."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "Learn the answers and their ends alone."})
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Of prompt and completion learn the completion alone; None does."}
    )
    packing: bool = field(default=False, metadata={"help": "Fill sequences with several rows, kept apart."})
    long: str = field(default="cut", metadata={"help": "Rows beyond max_seq_length: cut, split or refuse."})
    overlap: int = field(default=0, metadata={"help": "Tokens that a piece of a split row repeats of the last one."})
    allow: list[str] = field(default_factory=list, metadata={"help": "Codes of the check that shall not stop."})
    pass_tokens: int | None = field(default=None, metadata={"help": "Most tokens of a pass; None plans it."})
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of the matrices B as a multiple of A's (LoRA+); 16 is usual."}
    )
    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of a wholly trained embedding and head; None takes the rest's."}
    )


_LOSS_ALONE = "evaluation gives the loss alone, since predictions would be all the logits"

_REFUSED = {
    "torch_compile": "jebi's layers are hand-written nodes that gain nothing from it",
    "use_liger_kernel": "it patches other model classes; jebi has its own kernels",
    "neftune_noise_alpha": "its noise is scaled by padded row lengths, which jebi does not have",
    "fsdp": "sharding over several cards is not there yet",
    "deepspeed": "use one process or data parallel",
    "auto_find_batch_size": "jebi cuts a batch into passes that fit by itself",
    "parallelism_config": "use one process or data parallel",
    "optim_target_modules": "it picks whole weights for GaLore and APOLLO, and jebi trains adapters",
    "label_names": "what is learnt is always column 'labels'",
    "include_for_metrics": _LOSS_ALONE,
    "batch_eval_metrics": _LOSS_ALONE,
    "eval_use_gather_object": _LOSS_ALONE,
    "debug": "its hooks do not see into jebi's layers; a loss that is no number stops the training by itself",
}
"""Fields whose purpose jebi does not serve, with the reason given to the user."""

OWN_OPTIMIZER = ("adamw_8bit", "adamw_bnb_8bit")
"""Names of `TrainingArguments.optim` that jebi's `AdamW8bit` answers to."""

_CASTS = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}


def check(args: TrainingArguments, dtype: torch.dtype, device: torch.device) -> str | None:
    """Refuse what cannot be honoured; return a notice where something is done differently.

    Args:
        args: the settings.
        dtype: what the model computes in.
        device: where it lives.

    Raises:
        ConfigError: a field is set that jebi does not serve, or that contradicts the model.
    """
    refuse(args)
    for name, cast in _CASTS.items():
        if getattr(args, name) and dtype != cast:
            raise ConfigError(f"{name} would cast the model; load it with dtype=torch.{_name(cast)} instead.")
    return _precision(args, dtype, device)


def learning_of(args: TrainingArguments) -> Learn:
    """What is learnt, said in TRL's two settings."""
    if not isinstance(args, SFTConfig) or not (args.assistant_only_loss or args.completion_only_loss is not None):
        return "auto"
    return "answers" if args.assistant_only_loss or args.completion_only_loss else "all"


def refuse(args: TrainingArguments) -> None:
    """`ConfigError` for a field that does nothing here, whatever the model is."""
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name} is not supported: {reason}. Remove it.")
    _check_optimizer(args)
    layers = args.gradient_checkpointing_kwargs or {}
    assert not isinstance(layers, str), "TrainingArguments turns text into a dictionary"
    if (layers.get("every_n_layers") or 1) != 1:
        raise ConfigError("every_n_layers is not supported: jebi recomputes every layer or none. Remove it.")
    if isinstance(args, SFTConfig):
        if args.pass_tokens is not None and args.pass_tokens < 1:
            raise ConfigError(f"pass_tokens must be at least 1, not {args.pass_tokens}; None plans it.")
        require_choice(args.long, args.overlap, args.max_seq_length)
        require_codes(args.allow, "allow")


def _check_optimizer(args: TrainingArguments) -> None:
    optim = OptimizerNames(args.optim).value
    if optim in ("lomo", "adalomo"):
        raise ConfigError(f"optim='{optim}' is not supported: it updates weights within the backward. Choose another.")
    if args.optim_args and optim in OWN_OPTIMIZER:
        raise ConfigError(
            f"optim_args does nothing with optim='{optim}': set adam_beta1, adam_beta2, adam_epsilon and weight_decay."
        )


def _precision(args: TrainingArguments, dtype: torch.dtype, device: torch.device) -> str | None:
    """bf16 and fp16 must say what the model was loaded in, since that is what it computes in.

    On a CPU they say nothing: a script that asks for one of them, as for a card, runs there too.
    """
    asked = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if asked is None and dtype == torch.float16 and device.type != "cpu":
        raise ConfigError("a model in float16 needs its loss scaled, or gradients vanish: set fp16=True.")
    if dtype == torch.float16 and device.type == "cpu":
        return "float16 is slow on a CPU, and its loss is not scaled there: load the model with dtype=torch.float32."
    if asked is None or asked == dtype:
        return None
    flag = "bf16" if args.bf16 else "fp16"
    if device.type == "cpu":
        return f"{flag}=True, but the model was loaded in {_name(dtype)} on this CPU and computes in that."
    raise ConfigError(
        f"{flag}=True, but the model was loaded in {_name(dtype)}: load it with dtype=torch.{_name(asked)}, "
        f"or set {flag}=False."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def longest_row(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of the longest row to train on: what is asked for, or what the model was loaded for.

    Raises:
        ConfigError: more is asked for than the model serves.
    """
    loaded: int | None = getattr(model, "max_seq_length", None)
    # A model whose RoPE follows each row's length is loaded for longer rows than its config says.
    most = max(int(model.config.max_position_embeddings), loaded or 0)
    if asked is not None and asked > most:
        raise ConfigError(f"max_seq_length={asked} exceeds the model's {most}: set it in from_pretrained.")
    return asked or loaded or most
