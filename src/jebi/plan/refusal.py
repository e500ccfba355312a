"""Whether a model and a run fit the present device, asked before a weight is read; if not, what would.

A prediction may be off, so that only what surely does not fit is refused. Trainings of a model that is loaded already
are `training.room`'s.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from jebi.adapters.peft_config import CONFIG_FILE, base_of
from jebi.config import LoraConfig, Places, RunConfig, Storage, launched
from jebi.config.launched import ALONE, World
from jebi.errors import OutOfMemoryError
from jebi.models.device import default_device, default_dtype, free_bytes
from jebi.models.families import DecoderShape
from jebi.models.sizes import read_sizes
from jebi.plan.held import Held
from jebi.plan.inventory import GIB, KERNELS, model_items, total
from jebi.plan.jobs import Job, job_of, rows_of
from jebi.plan.places import reliefs
from jebi.plan.prediction import Prediction, over_more, predict, remedies
from jebi.plan.present import available, card_of, host_bytes, named
from jebi.plan.ranks import MACHINES
from jebi.plan.words import keywords, pasted

logger = logging.getLogger(__name__)

OFF, OFF_MORE = 0.04, 0.1
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
    world: World = ALONE
    """The processes that load it."""


def require_model(loading: Loading, device: torch.device) -> None:
    """Refuse a model whose weights alone do not fit; warn where no training of it would.

    Raises:
        OutOfMemoryError: it does not fit; the message says what would.
    """
    element = loading.dtype.itemsize
    on_card = device.type == "cuda"
    held = Held(loading.shape, loading.storage, element, loading.places, on_card=on_card, world=loading.world)
    free = free_bytes(device)

    def needed(storage: Storage, world: World = loading.world) -> int:
        spared = reliefs(held.shape, element, held.places)[-1].frees if on_card else 0
        one = dataclasses.replace(held, storage=storage, world=world)
        return total(model_items(one)) + one.gathered - spared

    if (least := needed(loading.storage)) > free:
        forms: tuple[tuple[str, Storage], ...] = (("load_in_8bit=True", "int8"), ("load_in_4bit=True", "nf4"))
        ways = [f"{text} ({_gb(needed(form))} GB)" for text, form in forms if needed(form) <= free]
        counts = [n for n in MACHINES if n > loading.world.ranks and on_card and held.divisible]
        more = next((n for n in counts if needed(loading.storage, World(n, n, shard=True)) <= free), None)
        raise OutOfMemoryError(
            f"'{loading.name}' does not fit {named(device)}: its weights take {_gb(least)} GB and {_gb(free)} GB are "
            f"free, {_gb(least - free)} GB too little. " + _ways(" or ".join(ways), loading.name, more)
        )
    lora = None if loading.storage == "masters" else LoraConfig()
    job = Job(dataclasses.replace(held, lora=lora), loading.max_seq_length, 1, 1, places=loading.places)
    found = predict(job, card_of(device), available(device), host_bytes(device))
    if refused(found, OFF if held.on_card else OFF_MORE):
        logger.warning(f"the model fits, but training it does not: {told(found, device, loading.name, keywords)}")


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
    job = job_of(run, sized.shape, default_dtype(device).itemsize == 2, rows, launched.world(run.model.shard))
    found = predict(job, card_of(device), available(device, run.train.get("memory_budget")), host_bytes(device))
    if found.fits:
        return
    exact = device.type == "cuda" and rows is None
    text = told(found, device, name, pasted)
    if refused(found, OFF if exact else OFF_MORE):
        raise OutOfMemoryError(f"this run does not fit: {text}")
    logger.warning(f"this run may not fit: {text}")


def refused(found: Prediction, off: float) -> bool:
    """Whether it does not fit even if its prediction is too high by a share, and by what is but a guess."""
    guess = sum(item.bytes for item in found.items if item.name == KERNELS)
    return not found.fits and found.missing - guess > off * (found.peak - guess)


def told(found: Prediction, device: torch.device, name: str, words: Words) -> str:
    """What is missing, and what would fit, in ``words`` of a command or a script."""
    ways = [f"{words(settings)} ({_gb(fitting.peak)} GB)" for settings, fitting in remedies(found, host_bytes(device))]
    text = (
        f"it takes {_gb(found.peak)} GB at the least and {named(device)} has {_gb(found.budget)} GB for it, "
        f"{_gb(found.missing)} GB too little. "
    )
    shared = over_more(found, host_bytes(device))
    return text + _ways(", or with ".join(ways), name, None if shared is None else shared.job.held.world.ranks)


def _ways(settings: str, name: str, more: int | None) -> str:
    """What would fit: settings, or ``more`` cards that divide the layers."""
    over = f"{more} such cards that divide its layers (jebi plan {name} --gpus {more} --shard)"
    if settings:
        return f"It would fit with {settings}{'' if more is None else f', or over {over}'}."
    if more is not None:
        return f"No setting makes it fit. It would over {over}."
    return f"No setting makes it fit: take a smaller model or a larger card (jebi plan {name} --all-gpus)."


def _gb(size: float) -> str:
    return f"{max(size, 0.1 * GIB) / GIB:.1f}"
