"""When memory runs out in spite of the plan: what was planned, what was measured, the way out, and what is kept."""

import contextlib
import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jebi.errors import OutOfMemoryError
from jebi.models.device import free_bytes
from jebi.models.hf import JebiForCausalLM
from jebi.plan.inventory import CONTEXT_BYTES, GIB
from jebi.plan.passes import PassPlan
from jebi.plan.prediction import predict, remedies
from jebi.plan.present import card_of, host_bytes
from jebi.plan.words import keywords, words
from jebi.training.pass_settings import Settings
from jebi.training.planning import job_of

logger = logging.getLogger(__name__)

_LESS = 0.9
"""Of what was reserved when it ran out: the budget that the next run is advised to keep to."""


@dataclass(frozen=True)
class Planned:
    """A training as it was planned."""

    model: JebiForCausalLM
    """What is trained."""
    settings: Settings
    """The trainer's."""
    plan: PassPlan
    """What was chosen."""
    predicted: dict[str, Any]
    """As `planning.predict` gives it."""


def ran_out(error: BaseException | None) -> bool:
    """Whether it is for want of memory; a capture that fails for it ends with another error on top."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(planned: Planned, keep: Callable[[], Path | None]) -> Iterator[None]:
    """Within it an error for want of memory is told with all that is known.

    Args:
        planned: the training.
        keep: saves what was learnt, if it can be, and says where the last checkpoint is.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemoryError) or not ran_out(error):
            raise
        measured = _measured(planned.model.device)
        _release(error)
        told = f"memory ran out: {_plan(planned)}; {measured}. {_way_out(planned)} {_kept(keep)}"
        raise OutOfMemoryError(told) from error


def _release(error: BaseException | None) -> None:
    """Let go of what the failed pass held: its frames hold its tensors."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plan(planned: Planned) -> str:
    job = job_of(planned.model, planned.settings)
    chosen = words(planned.plan, job.held.places, job)
    return f"planned were {chosen}, and {planned.predicted['peak_gb']:.2f} GB at the peak"


def _measured(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{free_bytes(device) / GIB:.2f} GB of this machine's memory are free"
    free, whole = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    others = max(0, whole - free - reserved - CONTEXT_BYTES)
    return (
        f"measured were {reserved / GIB:.2f} GB reserved, {allocated / GIB:.2f} of them allocated, and of the card's "
        f"{whole / GIB:.2f} GB {free / GIB:.2f} free, {others / GIB:.2f} held by others"
    )


def _way_out(planned: Planned) -> str:
    """A smaller budget, as long as the training fits one; else settings that would."""
    device = planned.model.device
    if device.type == "cuda":
        taken = torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    else:
        taken = int(planned.predicted["peak_gb"] * GIB)
    budget, host = int(_LESS * taken), host_bytes(device)
    found = predict(job_of(planned.model, planned.settings), card_of(device), budget, host)
    if found.fits:
        return f'Train with memory_budget="{budget / GIB:.1f}GB".'
    ways = [keywords(settings) for settings, _ in remedies(found, host)]
    return f"Train with {', or with '.join(ways)}." if ways else "Take a smaller model, shorter rows or a larger card."


def _kept(keep: Callable[[], Path | None]) -> str:
    try:
        checkpoint = keep()
    except (RuntimeError, MemoryError, OSError) as error:
        logger.warning(f"what was learnt since the last checkpoint could not be saved: {error}")
        checkpoint = None
    if checkpoint is None:
        return "No step was saved."
    return f"'{checkpoint}' is kept; resume_from_checkpoint=True (--resume) goes on from it."
