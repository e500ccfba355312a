"""Whether a model and a training fit, asked before a weight is read and before the first step; if not, what would.

What is counted is `plan.inventory`'s. A prediction may be off, so that only what surely does not fit is refused; what
may not fit is a warning.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch

from jebi.adapters.peft_config import CONFIG_FILE, base_of
from jebi.config import LoraConfig, Places, RunConfig, Storage
from jebi.errors import OutOfMemoryError
from jebi.models.device import default_device, default_dtype, free_bytes
from jebi.models.families import DecoderShape
from jebi.models.hf import JebiForCausalLM
from jebi.models.sizes import read_sizes
from jebi.plan.budget import FREE, budget_bytes
from jebi.plan.inventory import CONTEXT_BYTES, GIB, Held, everything, model_items, pass_items, total
from jebi.plan.jobs import Job, job_of, rows_of
from jebi.plan.passes import PassPlan
from jebi.plan.places import reliefs
from jebi.plan.prediction import Prediction, predict, remedies
from jebi.plan.words import keywords, pasted
from jebi.training import planning
from jebi.training.budget import memory_of
from jebi.training.pass_settings import Settings

logger = logging.getLogger(__name__)

_OFF, _OFF_MORE = 0.04, 0.1
"""Share by which a prediction may be too high: of a card, and of a process's memory or rows that are only estimated."""

Words = Callable[[Iterable[str]], str]
"""Puts settings as they are pasted."""


@dataclasses.dataclass(frozen=True)
class Loading:
    """A model as `FastLanguageModel.from_pretrained` is asked for it."""

    name: str
    """As the user called it."""
    shape: DecoderShape
    """Its sizes."""
    storage: Storage
    """How the projections are to be held."""
    dtype: torch.dtype
    """Compute dtype."""
    places: Places
    """Of embedding and head."""
    max_seq_length: int
    """Longest row."""


def require_model(loading: Loading, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit; warn where no training of it would.

    Raises:
        OutOfMemoryError: it does not fit; the message says what would.
    """
    element = loading.dtype.itemsize
    held = Held(loading.shape, loading.storage, element, loading.places, on_card=device.type == "cuda")
    free = free_bytes(device)

    def needed(storage: Storage) -> int:
        spared = reliefs(held.shape, element, held.places)[-1].frees if held.on_card else 0
        return total(model_items(dataclasses.replace(held, storage=storage))) - spared

    if (least := needed(loading.storage)) > free:
        forms: tuple[tuple[str, Storage], ...] = (("load_in_8bit=True", "int8"), ("load_in_4bit=True", "nf4"))
        ways = [f"{text} ({_gb(needed(form))} GB)" for text, form in forms if needed(form) <= free]
        raise OutOfMemoryError(
            f"'{loading.name}' does not fit {_named(device)}: its weights take {_gb(least)} GB and {_gb(free)} GB are "
            f"free, {_gb(least - free)} GB too little. "
            + (f"It would fit with {' or '.join(ways)}." if ways else _nothing(loading.name))
        )
    lora = None if loading.storage == "masters" else LoraConfig()
    job = Job(dataclasses.replace(held, lora=lora), loading.max_seq_length, 1, 1, places=loading.places)
    found = predict(job, planning.card_of(device), _budget(device, None), _host(device))
    if _refused(found, _OFF if held.on_card else _OFF_MORE):
        logger.warning(f"the model fits, but training it does not: {_told(found, device, loading.name, keywords)}")


def require_run(run: RunConfig) -> None:
    """Refuse a run that does not fit the present device, before its model is loaded.

    Raises:
        OutOfMemoryError: it does not fit; the message says by how much, and the settings that would.
        ModelError: there is no such model.
    """
    name = run.model.name
    folder = Path(name).expanduser()
    sized = read_sizes(base_of(folder) if (folder / CONFIG_FILE).is_file() else name, run.model.token)
    if sized.built_in:
        return  # There is nothing to load, which loading says.
    device, rows = default_device(), None if run.data.packing else rows_of(run)
    job = job_of(run, sized.shape, default_dtype(device).itemsize == 2, rows)
    found = predict(job, planning.card_of(device), _budget(device, run.train.get("memory_budget")), _host(device))
    exact = device.type == "cuda" and rows is None
    if _refused(found, _OFF if exact else _OFF_MORE):
        raise OutOfMemoryError(f"this run does not fit: {_told(found, device, name, pasted)}")


def require_room(model: JebiForCausalLM, settings: Settings, plan: PassPlan, room: int, places: Places) -> None:
    """Refuse a training of a loaded model whose longest row does not fit, or warn where it may not.

    Args:
        model: the model and its adapter.
        settings: the trainer's.
        plan: what takes the least.
        room: bytes that there are for passes, with embedding and head in ``places``.
        places: nothing left open.

    Raises:
        OutOfMemoryError: it surely does not fit; or a budget is given, which is a promise.
    """
    device, job = model.device, planning.job_of(model, settings)
    held = dataclasses.replace(job.held, places=places)
    tokens = job.filled(plan.tokens, fits=False)
    made = plan.made(tokens)
    short, peak = total(pass_items(held, made)) - room, total(everything(held, made))
    found = predict(job, planning.card_of(device), peak - short, _host(device))
    name = str(model.name_or_path)
    told = _told(dataclasses.replace(found, items=tuple(everything(held, made))), device, name, keywords)
    if settings.budget not in (None, FREE):
        raise OutOfMemoryError(
            f"memory_budget {settings.budget!r} does not hold a row of {settings.longest} tokens: {told} "
            f'Or raise it to "{math.ceil(10 * peak / GIB) / 10}GB".'
        )
    if short > peak * (_OFF if held.on_card else _OFF_MORE):
        raise OutOfMemoryError(f"rows of {settings.longest} tokens do not fit: {told}")
    logger.warning(f"rows of {settings.longest} tokens may not fit: {told}")


def _budget(device: torch.device, budget: float | str | None) -> int:
    """Bytes that a process may take here in all, as predictions count them."""
    if device.type == "cuda":
        # The context is there by now.
        free = free_bytes(device) + CONTEXT_BYTES
    else:
        free = free_bytes(device) + int(psutil.Process().memory_info().rss)
    return free if budget in (None, FREE) else min(free, budget_bytes(budget, memory_of(device)))


def _host(device: torch.device) -> int:
    return free_bytes(torch.device("cpu")) if device.type == "cuda" else 0


def _refused(found: Prediction, off: float) -> bool:
    return not found.fits and found.missing > off * found.peak


def _told(found: Prediction, device: torch.device, name: str, words: Words) -> str:
    """What is missing and what would fit."""
    ways = [f"{words(settings)} ({_gb(fitting.peak)} GB)" for settings, fitting in remedies(found, _host(device))]
    text = (
        f"it takes {_gb(found.peak)} GB at the least and {_named(device)} has {_gb(found.budget)} GB for it, "
        f"{_gb(found.missing)} GB too little. "
    )
    return text + (f"It would fit with {', or with '.join(ways)}." if ways else _nothing(name))


def _nothing(name: str) -> str:
    return f"No setting makes it fit: take a smaller model or a larger card (jebi plan {name} --all-gpus)."


def _named(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else "this machine"


def _gb(size: float) -> str:
    return f"{max(size, 0.1 * GIB) / GIB:.1f}"
