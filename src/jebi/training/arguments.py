"""The trainer's settings: transformers' `TrainingArguments` with jebi's own beside them.

Every field of `TrainingArguments` either works or is refused here by name; none is ignored in silence.
"""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from jebi.errors import ConfigError


@dataclass
class SFTConfig(TrainingArguments):
    """`TrainingArguments` and what the script passes to `SFTTrainer` directly, in one object."""

    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the rows' texts."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest row; None takes the model's."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    packing: bool = field(default=False, metadata={"help": "Fill sequences with several rows, kept apart."})
    pass_tokens: int | None = field(default=None, metadata={"help": "Most tokens of a pass; None plans it."})


_REFUSED = {
    "torch_compile": "jebi's layers are hand-written nodes that gain nothing from it",
    "use_liger_kernel": "it patches other model classes; jebi has its own kernels",
    "neftune_noise_alpha": "its noise is scaled by padded row lengths, which jebi does not have",
    "fsdp": "sharding over several cards is not there yet",
    "deepspeed": "use one process or data parallel",
    "auto_find_batch_size": "jebi cuts a batch into passes that fit by itself",
    "parallelism_config": "use one process or data parallel",
}
"""Fields whose purpose jebi does not serve, with the reason given to the user."""

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
    for name, reason in _REFUSED.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name} is not supported: {reason}. Remove it.")
    for name, cast in _CASTS.items():
        if getattr(args, name) and dtype != cast:
            raise ConfigError(f"{name} would cast the model; load it with dtype=torch.{_name(cast)} instead.")
    return _precision(args, dtype, device)


def _precision(args: TrainingArguments, dtype: torch.dtype, device: torch.device) -> str | None:
    """bf16 and fp16 must say what the model was loaded in, since that is what it computes in."""
    asked = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if asked is None or asked == dtype:
        return None
    flag = "bf16" if args.bf16 else "fp16"
    if device.type == "cpu" and asked == torch.bfloat16 and dtype == torch.float32:
        return f"{flag}=True, but the model was loaded in float32 on this CPU and computes in that."
    raise ConfigError(
        f"{flag}=True, but the model was loaded in {_name(dtype)}: load it with dtype=torch.{_name(asked)}, "
        f"or set {flag}=False."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
