"""Whole jobs over the rooms: train from a config, compare base and tuned. What the commands call.

Progress goes to stderr; nothing is printed here but what transformers and datasets show themselves.
"""

import json
import logging
import math
import typing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from jebi.adapters.peft_files import CONFIG_FILE, base_of, names_base
from jebi.config import DataConfig, RunConfig, check_type, reject_unknown
from jebi.data.control_tokens import as_ids
from jebi.data.findings import Report
from jebi.data.flat_rows import FlatRows, Ints, flat
from jebi.data.heldout import answer_rows
from jebi.data.long_rows import UNCUT, fit
from jebi.data.mojibake import repair
from jebi.data.sources import load_rows, require_columns
from jebi.data.templates import COLUMNS, DEFAULT_TEMPLATE, Template, named
from jebi.errors import AdapterError, ConfigError
from jebi.fast import FastLanguageModel
from jebi.inference.compare import Questions, compare_models
from jebi.inference.comparison import Comparison
from jebi.inference.page import render
from jebi.models.device import default_device, default_dtype
from jebi.models.files import EMBEDDED, find
from jebi.models.hf import JebiForCausalLM
from jebi.training.arguments import SFTConfig, refuse
from jebi.training.checkpoints import require_writable, write_whole
from jebi.training.preparation import Preparation
from jebi.training.trainer import SFTTrainer

logger = logging.getLogger(__name__)

RUN_FILE = "jebi_run.json"
"""Beside the adapter: the config it was trained with, from which chat and compare take the template."""


def train(config: RunConfig, callbacks: list[TrainerCallback], resume: bool = False) -> SFTTrainer:
    """Train as the config says; adapter, tokenizer, report and config are in the output folder afterwards."""
    rows, heldout = _read(config.data)
    args = arguments(config, evaluates=heldout is not None)
    output = Path(str(args.output_dir))
    require_writable(output)
    if resume and get_last_checkpoint(str(output)) is None:
        raise ConfigError(f"--resume: '{output}' holds no checkpoint to go on from; start without it.")
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise ConfigError(f"train.resume_from_checkpoint: there is no folder '{args.resume_from_checkpoint}'.")
    model, tokenizer = _load(config)
    _adapt(model, config)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=_prepared(rows, config, tokenizer),
        eval_dataset=_prepared(heldout, config, tokenizer) if heldout is not None else None,
        dataset_text_field=config.data.text_field or "text",
        max_seq_length=config.model.max_seq_length,
        packing=config.data.packing,
        args=args,
        callbacks=callbacks,
    )
    # The callers' callbacks show progress; Trainer's own print their log lines to stdout.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or args.resume_from_checkpoint)
    trainer.save_model()
    write_whole(output / RUN_FILE, json.dumps(_without_secrets(config), indent=2, ensure_ascii=False) + "\n")
    return trainer


_ELSEWHERE = {
    "packing": "data.packing",
    "long": "data.long",
    "overlap": "data.overlap",
    "allow": "data.allow",
    "dataset_text_field": "data.text_field",
    "max_seq_length": "model.max_seq_length",
}
"""Fields of `SFTConfig` that a config file sets in another section."""


def arguments(config: RunConfig, evaluates: bool = False) -> SFTConfig:
    """The trainer's settings: the section's over those that suit a command.

    Args:
        config: the run.
        evaluates: whether there are held-out rows, whose loss is then taken after every epoch and at the end.

    Raises:
        ConfigError: a setting is unknown, has the wrong type, or contradicts another.
    """
    for name, place in _ELSEWHERE.items():
        if name in config.train:
            raise ConfigError(f"train.{name}: set {place} instead.")
    if not evaluates and config.train.get("eval_strategy", "no") not in ("no", False):
        raise ConfigError("train.eval_strategy needs held-out rows: set data.heldout or data.heldout_share.")
    hints = typing.get_type_hints(SFTConfig)
    reject_unknown(config.train, {field.name for field in fields(SFTConfig) if field.init}, "train.")
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
    return args


@dataclass(frozen=True)
class Inspection:
    """What a training would see."""

    rows: FlatRows
    """Its token rows."""
    lengths: Ints
    """Tokens of every row before any is cut or split."""
    tokenizer: PreTrainedTokenizerBase
    """Turns them back into text."""
    report: Report
    """What is wrong with them."""
    longest: int
    """``max_seq_length``."""
    long: str
    """What becomes of longer rows."""
    allowed: list[str]
    """Codes that do not stop."""
    steps: str
    """Optimizer steps, and how they come about."""


def inspect(config: RunConfig) -> Inspection:
    """Prepare the rows as `train` would, and check them; of the model only its tokenizer and configs are read."""
    given, heldout = _read(config.data)
    args = arguments(config, evaluates=heldout is not None)
    files = find(config.model.name, config.model.token)
    tokenizer, generation = files.tokenizer(), files.generation_config()
    data, longest = config.data, config.model.max_seq_length
    field = data.text_field or "text"
    workers = args.dataset_num_proc
    preparation = Preparation(tokenizer, field, None, longest, workers, data.packing, data.long, data.overlap)
    texts = _prepared(given, replace(config, data=replace(data, long="split")), tokenizer)
    uncut = preparation.tokenized(texts, UNCUT)
    tokens = fit(uncut, longest, data.long, data.overlap)
    measured = preparation(_prepared(heldout, config, tokenizer)) if heldout is not None else None
    report = preparation.check(tokens, texts, measured, as_ids(generation.eos_token_id if generation else None))
    steps = _steps(args, len(_known(preparation.packed(tokens))))
    rows, lengths = flat(_known(tokens)).cut(longest), flat(_known(uncut)).lengths
    return Inspection(rows, lengths, tokenizer, report, longest, data.long, data.allow, steps)


def _known(rows: Any) -> Dataset:
    assert isinstance(rows, Dataset), "rows of a config have a known length"
    return rows


def _steps(args: SFTConfig, sequences: int) -> str:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    epoch = math.ceil(sequences / batch)
    if args.max_steps > 0:
        return f"{args.max_steps:,} of {batch} (max_steps), {args.max_steps / epoch:.1f} epochs"
    return f"{math.ceil(epoch * args.num_train_epochs):,} of {batch} in {args.num_train_epochs:g} epochs"


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
    base, form = base_for(adapter, base), template_of(adapter, template)
    asked = _questions(questions, heldout)
    require_writable(output)
    run = _run_of(adapter)
    model, tokenizer = FastLanguageModel.from_pretrained(base, **model_settings(adapter))
    FastLanguageModel.put_adapter(model, adapter)
    FastLanguageModel.for_inference(model)
    comparison = compare_models(
        model,
        tokenizer,
        form,
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


def template_of(adapter: Path | None, named_or_text: str | None) -> Template:
    """The template asked for, or the one the adapter was trained with, or the tutorial's."""
    if named_or_text is not None:
        return named(named_or_text)
    data = _run_of(adapter).get("data", {}) if adapter is not None else {}
    if data.get("text_field"):
        raise ConfigError(f"'{adapter}' was trained on ready texts: say with --template how a question is put.")
    return named(data.get("template") or DEFAULT_TEMPLATE)


def _load(config: RunConfig) -> tuple[JebiForCausalLM, PreTrainedTokenizerBase]:
    model = config.model
    dtype = getattr(torch, model.dtype) if model.dtype else None
    return FastLanguageModel.from_pretrained(
        model.name, model.max_seq_length, dtype, model.load_in_4bit, model.token, rope_scaling=model.rope_scaling
    )


def _adapt(model: JebiForCausalLM, config: RunConfig) -> None:
    FastLanguageModel.get_peft_model(model, **asdict(config.lora))


def _read(data: DataConfig) -> tuple[Dataset, Dataset | None]:
    """Training rows and held-out rows."""
    needed = (data.text_field,) if data.text_field else COLUMNS
    if not data.text_field:
        named(data.template or DEFAULT_TEMPLATE)  # a wrong one is told before anything is loaded
    rows = load_rows(data.train, data.split)
    require_columns(rows, needed, data.train)
    if data.repair_encoding:
        rows, mended = repair(rows)
        logger.warning(f"data.repair_encoding: {mended} of {len(rows)} rows were turned back.")
    if data.heldout:
        heldout = load_rows(data.heldout)
        require_columns(heldout, needed, data.heldout)
        return rows, heldout
    if data.heldout_share:
        if len(rows) - math.ceil(len(rows) * data.heldout_share) < 1:
            raise ConfigError(f"data.heldout_share={data.heldout_share} of {len(rows)} rows leaves none to train on.")
        parts = rows.train_test_split(test_size=data.heldout_share, seed=0)
        return parts["train"], parts["test"]
    return rows, None


def _prepared(rows: Dataset, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows as the trainer takes them: whole texts with their EOS, or token rows whose answers alone are learnt.

    The columns they were made of stay beside them, for the check to read.
    """
    data = config.data
    if data.text_field:
        return rows
    template, eos = named(data.template or DEFAULT_TEMPLATE), str(tokenizer.eos_token)
    if data.learn == "answers":
        longest = config.model.max_seq_length if data.long == "cut" else UNCUT
        tokens = Dataset.from_list(answer_rows(rows, template, tokenizer, longest))
        return concatenate_datasets([tokens, rows.select_columns(list(COLUMNS))], axis=1)
    texts = [template.row(row["instruction"], row["input"], row["output"], eos) for row in rows]
    return concatenate_datasets([Dataset.from_dict({"text": texts}), rows.select_columns(list(COLUMNS))], axis=1)


def _without_secrets(config: RunConfig) -> dict[str, Any]:
    """The config as it may lie beside an adapter that is given away."""
    record = asdict(config)
    record["model"]["token"] = None
    record["train"].pop("hub_token", None)
    return record


def _questions(questions: Path, heldout: Path | None) -> Questions:
    harmful = load_rows(str(questions))
    require_columns(harmful, ("instruction",), str(questions))
    rows: list[dict[str, str]] = []
    if heldout is not None:
        table = load_rows(str(heldout))
        require_columns(table, COLUMNS, str(heldout))
        rows = list(table)
    return Questions(harmful=list(harmful), heldout=rows)


def _run_of(adapter: Path) -> dict[str, Any]:
    path = adapter / RUN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def model_settings(adapter: Path | None) -> dict[str, Any]:
    """How the adapter's base was held in training, so that it is held the same way now."""
    model = _run_of(adapter).get("model", {}) if adapter is not None else {}
    dtype = model.get("dtype")
    return {
        "max_seq_length": model.get("max_seq_length", 2048),
        "load_in_4bit": model.get("load_in_4bit", True),
        "dtype": getattr(torch, dtype) if dtype else None,
        "rope_scaling": model.get("rope_scaling"),
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
