"""``training.arguments``: every field of `TrainingArguments` works, here or in Trainer, or is refused by name.

The lists are written out, so that a field that a new transformers brings fails the test until someone has thought
about it: does Trainer's code that `SFTTrainer` leaves alone serve it, does jebi's, or is it refused?
"""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from jebi import SFTConfig, SFTTrainer
from jebi.errors import ConfigError
from jebi.training.arguments import _REFUSED, check

CPU = torch.device("cpu")

TRAINER = """
    num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay
    max_grad_norm per_device_train_batch_size
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    save_strategy save_steps save_on_each_node enable_jit_checkpoint save_only_model
    metric_for_best_model greater_is_better
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed data_seed use_cpu tf32 use_cache average_tokens_across_devices accelerator_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    skip_memory_metrics include_num_input_tokens_seen
    torch_compile_backend torch_compile_mode liger_kernel_config fsdp_config
    do_train do_eval do_predict local_rank
"""
"""Served by Trainer's own code.

`compute_loss` and the counting of a step's tokens are among it (``average_tokens_across_devices``), and so are the data
loaders. The settings of a refused feature mean something only with it: naming a ``torch_compile_backend`` turns
``torch_compile`` on, which is refused. The ``do_`` flags are for scripts, as Trainer documents them.
"""

JEBI = {
    "output_dir": "checkpoints.require_writable tries it before anything is loaded",
    "gradient_accumulation_steps": "SFTTrainer.training_step collects the micro-batches and runs them together",
    "optim": "SFTTrainer.get_optimizer_cls_and_kwargs has the 8-bit AdamW; other names are Trainer's",
    "optim_args": "Trainer's, and refused by check with jebi's own optimizer, which has none",
    "adam_beta1": "SFTTrainer.get_optimizer_cls_and_kwargs",
    "adam_beta2": "SFTTrainer.get_optimizer_cls_and_kwargs",
    "adam_epsilon": "SFTTrainer.get_optimizer_cls_and_kwargs",
    "label_smoothing_factor": "a keyword of the model's loss, in training and in evaluation",
    "bf16": "check: the model computes in what it was loaded in, and this must say the same",
    "fp16": "check: as bf16; the loss scaling is accelerate's",
    "bf16_full_eval": "check: as bf16",
    "fp16_full_eval": "check: as bf16",
    "activation_checkpointing": "engine.make_plan sets what the layers keep",
    "activation_checkpointing_kwargs": "engine.make_plan (offload); check refuses every_n_layers",
    "gradient_checkpointing": "the older name of activation_checkpointing; TrainingArguments keeps both equal",
    "gradient_checkpointing_kwargs": "likewise",
    "torch_empty_cache_steps": "SFTTrainer.training_step",
    "logging_nan_inf_filter": "SFTTrainer._require_finite: such a loss stops the run, so there is none to filter",
    "disable_tqdm": "Trainer's in a script; the command has a bar of its own, cli.progress",
    "prediction_loss_only": "SFTTrainer.evaluation_loop never returns anything else",
    "eval_accumulation_steps": "SFTTrainer.evaluation_loop adds up two numbers, so nothing accumulates",
    "eval_do_concat_batches": "likewise: there are no predictions to concatenate",
    "save_total_limit": "checkpoints.complete_checkpoint, once the new checkpoint is in its place",
    "load_best_model_at_end": "SFTTrainer._load_best_model",
    "resume_from_checkpoint": "run.train, the command; Trainer's own reads it only from train's argument",
    "remove_unused_columns": "data.rows.tokenize leaves only what is used",
    "length_column_name": "data.rows.tokenize drops the column; the samplers measure the tokens themselves",
}
"""Served by jebi, and where."""

REFUSED: dict[str, Any] = {
    "torch_compile": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
    "fsdp": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "auto_find_batch_size": True,
    "parallelism_config": object(),
    "optim_target_modules": ["q_proj"],
    "label_names": ["targets"],
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "eval_use_gather_object": True,
    "debug": "underflow_overflow",
}
"""Refused, each with a value that sets it."""


def test_every_field_works_or_is_refused() -> None:
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert sorted([*TRAINER.split(), *JEBI, *REFUSED]) == sorted(fields), "each field is in exactly one list"
    assert set(REFUSED) == set(_REFUSED)


def arguments(folder: Path, **settings: Any) -> SFTConfig:
    return SFTConfig(**({"output_dir": str(folder), "use_cpu": True} | settings))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    # Set afterwards: some need packages or cards already where TrainingArguments looks at them.
    setattr(args, name, REFUSED[name])
    with pytest.raises(ConfigError, match=rf"^{name} is not supported: .+\. Remove it\.$"):
        check(args, torch.float32, CPU)


@pytest.mark.parametrize("settings", [{"torch_compile_backend": "inductor"}, {"torch_compile_mode": "default"}])
def test_a_part_of_torch_compile_turns_it_on_and_is_refused_with_it(settings: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch_compile is not supported"):
        check(arguments(tmp_path, **settings), torch.float32, CPU)


def test_the_defaults_are_accepted(tmp_path: Path) -> None:
    assert check(arguments(tmp_path), torch.float32, CPU) is None
    assert check(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), torch.bfloat16, CPU) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "lomo"}, "optim='lomo' is not supported: it updates weights within the backward"),
        ({"optim": "adamw_8bit", "optim_args": "a=1"}, "optim_args does nothing with optim='adamw_8bit'"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
            "every_n_layers is not supported",
        ),
        ({"pass_tokens": 0}, "pass_tokens must be at least 1, not 0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(arguments(tmp_path, **settings), torch.float32, CPU)


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_does_not_cast_the_model(field: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, **{field: True})
    dtype = torch.bfloat16 if field.startswith("bf16") else torch.float16
    check(args, dtype, CPU)
    with pytest.raises(ConfigError, match=rf"{field} would cast the model; load it with dtype={dtype} instead"):
        check(args, torch.float32, CPU)


def test_a_float16_model_on_a_card_needs_its_loss_scaled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set fp16=True"):
        check(arguments(tmp_path), torch.float16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("flag", "dtype", "device", "outcome"),
    [
        (None, torch.float32, "cpu", None),
        (None, torch.float16, "cpu", "float16 is slow on a CPU, and its loss is not scaled"),
        ("bf16", torch.bfloat16, "cpu", None),
        ("bf16", torch.bfloat16, "cuda", None),
        ("fp16", torch.float16, "cuda", None),
        ("bf16", torch.float32, "cpu", "the model was loaded in float32 on this CPU and computes in that"),
        ("fp16", torch.float32, "cpu", "the model was loaded in float32 on this CPU and computes in that"),
        ("fp16", torch.bfloat16, "cpu", "the model was loaded in bfloat16 on this CPU and computes in that"),
        ("bf16", torch.float32, "cuda", ConfigError),
        ("bf16", torch.float16, "cuda", ConfigError),
        ("fp16", torch.bfloat16, "cuda", ConfigError),
        ("fp16", torch.float32, "cuda", ConfigError),
    ],
)
def test_the_precision_is_the_models(
    flag: str | None, dtype: torch.dtype, device: str, outcome: Any, tmp_path: Path
) -> None:
    args = arguments(tmp_path)
    if flag:
        setattr(args, flag, True)
    if outcome is ConfigError:
        asked = {"bf16": "bfloat16", "fp16": "float16"}[str(flag)]
        with pytest.raises(ConfigError, match=rf"{flag}=True, but .* dtype=torch.{asked}, or set {flag}=False"):
            check(args, dtype, torch.device(device))
    else:
        notice = check(args, dtype, torch.device(device))
        assert notice is None if outcome is None else outcome in str(notice)


def test_float16_on_a_card_needs_its_loss_scaled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs its loss scaled.*set fp16=True"):
        check(arguments(tmp_path), torch.float16, torch.device("cuda"))


def test_jebis_own_fields_are_these() -> None:
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name: field for field in dataclasses.fields(SFTConfig) if field.name not in base}
    assert list(own) == [
        *("dataset_text_field", "max_seq_length", "dataset_num_proc", "assistant_only_loss", "completion_only_loss"),
        *("packing", "long", "overlap", "allow", "pass_tokens", "loraplus_lr_ratio", "embedding_learning_rate"),
    ]
    assert all(field.metadata["help"] for field in own.values())


WITHOUT = {
    "data_collator",
    "model_init",
    "compute_loss_func",
    "compute_metrics",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
}
"""What Trainer takes and `SFTTrainer` leaves out: they would see logits, or batches that are not jebi's."""


def test_the_trainer_takes_no_argument_that_it_would_not_serve(make_trainer: Callable[..., SFTTrainer]) -> None:
    theirs, ours = (set(inspect.signature(trainer.__init__).parameters) for trainer in (Trainer, SFTTrainer))
    assert theirs - ours == WITHOUT
    with pytest.raises(TypeError, match="unexpected keyword argument 'compute_metrics'"):
        make_trainer(trainer={"compute_metrics": lambda prediction: {}})


def test_the_script_s_call_is_taken() -> None:
    names = list(inspect.signature(SFTTrainer).parameters)
    assert names[:8] == [
        "model",
        "tokenizer",
        "train_dataset",
        "eval_dataset",
        "dataset_text_field",
        "max_seq_length",
        "dataset_num_proc",
        "packing",
    ]
