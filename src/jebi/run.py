"""Whole jobs over the rooms: train from a config, compare base and tuned. What the commands call.

Progress goes to stderr; nothing is printed here but what transformers and datasets show themselves.
"""

import json
import logging
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from jebi.adapters.peft_config import CONFIG_FILE, base_of, names_base
from jebi.config import DataConfig, RunConfig, check_type
from jebi.config.train_section import require_names
from jebi.data import loading, templates
from jebi.data.conversation import question
from jebi.data.formatters import load_formatter
from jebi.data.mixing import read_sources
from jebi.data.mojibake import repair
from jebi.data.preparation import UNCUT, Preparation
from jebi.data.rows import Rows
from jebi.data.sources import load_rows, require_columns
from jebi.data.turns import require_roles
from jebi.errors import AdapterError, ConfigError
from jebi.fast import FastLanguageModel
from jebi.inference.compare import Questions, compare_models
from jebi.inference.comparison import Comparison
from jebi.inference.page import render
from jebi.models.device import default_device, default_dtype
from jebi.models.hf import JebiForCausalLM
from jebi.models.sizes import EMBEDDED
from jebi.models.tokenizer import beside
from jebi.plan.refusal import require_run
from jebi.training.arguments import SFTConfig, refuse
from jebi.training.budget import within
from jebi.training.checkpoints import require_writable, write_whole
from jebi.training.trainer import SFTTrainer

logger = logging.getLogger(__name__)

RUN_FILE = "jebi_run.json"
"""Beside the adapter: the config it was trained with, from which chat and compare take the template."""


def train(config: RunConfig, callbacks: list[TrainerCallback], resume: bool = False) -> SFTTrainer:
    """Train as the config says; adapter, tokenizer, report and config are in the output folder afterwards."""
    rows, heldout = read(config.data)
    args = arguments(config, evaluates=bool(heldout))
    output = Path(str(args.output_dir))
    require_writable(output)
    if resume and get_last_checkpoint(str(output)) is None:
        raise ConfigError(f"--resume: '{output}' holds no checkpoint to go on from; start without it.")
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise ConfigError(f"train.resume_from_checkpoint: there is no folder '{args.resume_from_checkpoint}'.")
    require_run(config)
    with within(default_device(), args.memory_budget):
        model, tokenizer = _load(config)
    if not config.model.full_finetuning:
        _adapt(model, config)
    longest = config.model.max_seq_length
    ready = token_rows(rows, heldout, config, args, tokenizer, longest if config.data.long == "cut" else UNCUT)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=ready.train,
        eval_dataset=ready.heldout,
        dataset_text_field=config.data.text_field,
        max_seq_length=longest,
        packing=config.data.packing,
        args=args,
        callbacks=callbacks,
    )
    trainer.texts = ready.texts
    trainer.prepare.all_drawn = ready.all_drawn
    # The callers' callbacks show progress; Trainer's own print their log lines to stdout.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or args.resume_from_checkpoint)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return trainer
    record = _without_secrets(config)
    template = ready.template
    record["data"] |= {"template": template, "text_field": config.data.text_field or (None if template else "text")}
    write_whole(output / RUN_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return trainer


@dataclass(frozen=True)
class TokenRows:
    """A run's rows as tokens."""

    train: Rows
    """To train on."""
    heldout: Rows | None
    """To measure on."""
    texts: list[Rows]
    """What the training rows were made of."""
    template: str | None
    """What wrote them; None where they were ready texts."""
    all_drawn: bool
    """Whether every row of theirs is among the training rows, but for those that teach nothing."""


def token_rows(
    rows: loading.Parts,
    heldout: loading.Parts,
    config: RunConfig,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
) -> TokenRows:
    """Write and tokenise the rows; ``limit`` is where they are cut."""
    if config.data.formatter:
        formatter = load_formatter(config.data.formatter, tokenizer)
        rows, heldout = loading.formatted(rows, formatter), loading.formatted(heldout, formatter)
    how = preparation(config.data, limit, args.dataset_num_proc)
    template = loading.template_of_all(rows + heldout, how)
    seed = args.seed if args.data_seed is None else args.data_seed
    train = loading.prepare(rows, tokenizer, how, seed, config.data.shuffle_buffer)
    apart = loading.prepare(heldout, tokenizer, how, seed) if heldout else None
    all_drawn = all(source.weight >= 1 for source, _ in rows)
    return TokenRows(train, apart, [part for _, part in rows], template, all_drawn)


def arguments(config: RunConfig, evaluates: bool = False) -> SFTConfig:
    """The trainer's settings: the section's over those that suit a command.

    Args:
        config: the run.
        evaluates: whether there are held-out rows, whose loss is then taken after every epoch and at the end.

    Raises:
        ConfigError: a setting is unknown, has the wrong type, or contradicts another.
    """
    require_names(config.train, {field.name for field in fields(SFTConfig) if field.init})
    if not evaluates and config.train.get("eval_strategy", "no") not in ("no", False):
        raise ConfigError("train.eval_strategy needs held-out rows: set data.heldout or data.heldout_share.")
    hints = typing.get_type_hints(SFTConfig)
    for name, value in config.train.items():
        check_type(hints[name], value, f"train.{name}")
    settings: dict[str, Any] = {"output_dir": "outputs", "report_to": [], "logging_steps": 1, "save_strategy": "no"}
    settings |= {"long": config.data.long, "overlap": config.data.overlap, "allow": config.data.allow}
    settings |= {"disable_tqdm": False, "eval_strategy": "epoch" if evaluates else "no"} | config.train
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", True)
    elif (config.model.dtype or default_dtype(default_device())) in ("float16", torch.float16):
        settings.setdefault("fp16", True)  # scales the loss
    try:
        args = SFTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"section 'train': {error}") from error
    refuse(args)
    if config.data.streaming and args.max_steps <= 0:
        raise ConfigError("data.streaming needs train.max_steps: how long a stream is nobody knows.")
    return args


def compare(
    base: str | None,
    adapter: Path,
    questions: Path,
    heldout: Path | None,
    output: Path,
    max_new_tokens: int = 64,
    template: str | None = None,
) -> Comparison:
    """Ask base and tuned model the same questions; write compare.json and compare.html into ``output``."""
    if not (adapter / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter '{adapter}' has no {CONFIG_FILE}; name a folder that a training wrote.")
    base, form = base_for(adapter, base), template_of(adapter, template)  # faults are told before a model is loaded
    asked = _questions(questions, heldout)
    require_writable(output)
    run = _run_of(adapter)
    model, tokenizer = FastLanguageModel.from_pretrained(base, **model_settings(adapter))
    FastLanguageModel.put_adapter(model, adapter)
    tokenizer = beside(adapter, tokenizer, model)
    FastLanguageModel.for_inference(model)
    comparison = compare_models(
        model,
        tokenizer,
        templates.named(form, tokenizer),
        asked,
        max_new_tokens=max_new_tokens,
        names=(base, str(adapter)),
        loss_curve=_loss_curve(adapter),
        settings=_shown(run, max_new_tokens),
    )
    write_whole(output / "compare.json", comparison.to_json())
    write_whole(output / "compare.html", render(comparison))
    return comparison


def base_for(adapter: Path | None, base: str | None) -> str:
    """The model named, or the adapter's own base, or the embedded one; a notice where adapter and name disagree."""
    if adapter is None:
        return base or EMBEDDED
    if base is None:
        return base_of(adapter)
    own = names_base(adapter)
    if own is not None and own != base and not _same_place(base, own):
        logger.warning(f"'{adapter}' was trained on '{own}', and is put on '{base}'.")
    return base


def _same_place(one: str, other: str) -> bool:
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def template_of(adapter: Path | None, spec: str | None) -> str:
    """What `templates.named` takes: the template asked for, or the adapter's own, or the tutorial's."""
    if spec is None:
        data = _run_of(adapter).get("data", {}) if adapter is not None else {}
        if data.get("text_field"):
            raise ConfigError(f"'{adapter}' was trained on ready texts: say with --template how a question is put.")
        spec = str(data.get("template") or templates.DEFAULTS["alpaca"])
    templates.check(spec)
    return spec


def _load(config: RunConfig) -> tuple[JebiForCausalLM, PreTrainedTokenizerBase]:
    settings = asdict(config.model)
    if settings["dtype"]:
        settings["dtype"] = getattr(torch, settings["dtype"])
    return FastLanguageModel.from_pretrained(settings.pop("name"), **settings)


def _adapt(model: JebiForCausalLM, config: RunConfig) -> None:
    FastLanguageModel.get_peft_model(model, **asdict(config.lora))


def read(data: DataConfig) -> tuple[loading.Parts, loading.Parts]:
    """Training rows and held-out rows; what is wrong with them is told before a model is loaded."""
    if data.template:
        templates.check(data.template)
    require_roles(data.roles)
    heldout: loading.Parts = []
    rows = loading.read(read_sources(data.train, "data.train"), data.split, data.streaming)
    if data.heldout:
        heldout = loading.read(read_sources(data.heldout, "data.heldout"), "train")
        heldout = [(replace(source, weight=1.0), part) for source, part in heldout]
    if data.repair_encoding:
        rows, heldout = _repaired(rows), _repaired(heldout)
    if data.formatter is None:
        how = preparation(data, 1)
        loading.template_of_all(rows + heldout, how)
        loading.require_readable(rows + heldout, how)
    if data.heldout_share and not heldout:
        rows, heldout = loading.hold_out(rows, data.heldout_share)
    return rows, heldout


def _repaired(parts: loading.Parts) -> loading.Parts:
    """The rows with text turned back that was read in the wrong encoding."""
    repaired: loading.Parts = []
    for source, rows in parts:
        mended, count = repair(rows)
        repaired.append((source, mended))
        if isinstance(rows, Dataset):
            logger.warning(f"data.repair_encoding: {count} of {len(rows)} rows of '{source.name}' were turned back.")
    return repaired


def preparation(data: DataConfig, max_length: int, workers: int | None = None) -> Preparation:
    """How the section's rows become tokens."""
    return Preparation(
        max_length=max_length,
        text_field=data.text_field,
        format="text" if data.text_field else data.format,
        template=data.template,
        learn=data.learn,
        special_tokens=None if data.special_tokens_in_text == "auto" else data.special_tokens_in_text,
        roles=data.roles,
        skip_bad_rows=data.bad_rows == "skip",
        workers=workers,
    )


def _without_secrets(config: RunConfig) -> dict[str, Any]:
    """The config as it may lie beside an adapter that is given away."""
    record = asdict(config)
    record["model"]["token"] = None
    record["train"].pop("hub_token", None)
    return record


def _questions(questions: Path, heldout: Path | None) -> Questions:
    harmful = load_rows(str(questions))
    require_columns(harmful, ("instruction",), str(questions))
    asked = [question(row["instruction"], row.get("input") or "") for row in harmful]
    return Questions(asked, [] if heldout is None else loading.conversations(str(heldout)))


def _run_of(adapter: Path) -> dict[str, Any]:
    path = adapter / RUN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def model_settings(adapter: Path | None) -> dict[str, Any]:
    """How the adapter's base was held in training, so that it is held the same way now."""
    model = _run_of(adapter).get("model", {}) if adapter is not None else {}
    dtype = model.get("dtype")
    return {
        "max_seq_length": model.get("max_seq_length", 2048),
        "load_in_4bit": model.get("load_in_4bit"),
        "load_in_8bit": model.get("load_in_8bit", False),
        "dtype": getattr(torch, dtype) if dtype else None,
        "rope_scaling": model.get("rope_scaling"),
        "embedding": model.get("embedding", "auto"),
        "head": model.get("head", "auto"),
    }


def _shown(run: dict[str, Any], max_new_tokens: int) -> dict[str, object]:
    """Settings for the page, one level deep."""
    flat: dict[str, object] = {"max_new_tokens": max_new_tokens, "decoding": "greedy"}
    for section in ("model", "lora", "train"):
        flat |= {f"{section}.{key}": value for key, value in run.get(section, {}).items() if key != "token"}
    return flat


def _loss_curve(adapter: Path) -> list[tuple[int, float]]:
    path = adapter / "report.json"
    if not path.is_file():
        return []
    log = json.loads(path.read_text(encoding="utf-8")).get("log", [])
    return [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry]
