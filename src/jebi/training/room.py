"""Whether a training of a loaded model fits, asked before its first step; if not, what would.

What is counted is `plan.inventory`'s; models that are not loaded yet are `plan.refusal`'s.
"""

import dataclasses
import logging
import math

from jebi.config import Places
from jebi.errors import OutOfMemoryError
from jebi.models.hf import JebiForCausalLM
from jebi.plan.budget import FREE
from jebi.plan.inventory import GIB, everything, fixed_items, pass_items, total
from jebi.plan.passes import PassPlan
from jebi.plan.prediction import predict
from jebi.plan.present import card_of, host_bytes
from jebi.plan.refusal import OFF, OFF_MORE, told
from jebi.plan.words import keywords
from jebi.training.pass_settings import Settings
from jebi.training.planning import job_of

logger = logging.getLogger(__name__)


def require_room(model: JebiForCausalLM, settings: Settings, plan: PassPlan, room: int, places: Places) -> None:
    """Refuse a training of a loaded model whose longest row does not fit, or warn where it may not.

    Args:
        model: the model and its adapter.
        settings: the trainer's.
        plan: what takes the least.
        room: bytes that there are for passes (`plan.passes.Room.card`), with embedding and head in ``places``.
        places: nothing left open.

    Raises:
        OutOfMemoryError: it surely does not fit; or a budget is given, which is a promise.
    """
    device, job = model.device, job_of(model, settings)
    held = dataclasses.replace(job.held, places=places)
    made = plan.made(job.filled(plan.tokens))
    items = everything(held, made)
    short, peak = total(pass_items(held, made)) - total(fixed_items(held)) - room, total(items)
    found = predict(job, card_of(device), peak - short, host_bytes(device))
    name = str(model.name_or_path)
    text = told(dataclasses.replace(found, items=tuple(items)), device, name, keywords)
    one, several = (f"{unit} of {job.largest} tokens" for unit in ("a row", "rows"))
    if job.largest > job.longest:
        one, several = f"pass_tokens={settings.pass_tokens}", f"passes of pass_tokens={settings.pass_tokens}"
    if settings.budget not in (None, FREE):
        raise OutOfMemoryError(
            f"memory_budget {settings.budget!r} does not hold {one}: {text} "
            f'Or raise it to "{math.ceil(10 * peak / GIB) / 10}GB".'
        )
    if short > peak * (OFF if held.on_card else OFF_MORE):
        raise OutOfMemoryError(f"{several} do not fit: {text}")
    logger.warning(f"{several} may not fit: {text}")
