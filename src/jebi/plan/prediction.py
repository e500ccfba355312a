"""What a run will be on a card: chosen as the trainer will choose, its memory, its time, and what else is possible.

Everything is made of `inventory`, `passes`, `places` and `time`; how it is shown is the command's. No torch here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jebi.config import Checkpointing, Places
from jebi.plan.cards import Card
from jebi.plan.inventory import (
    CONTEXT_BYTES,
    PROCESS_BYTES,
    Held,
    Item,
    Pass,
    adapter_items,
    everything,
    kept_weight_bytes,
    model_items,
    scratch_bytes,
    total,
)
from jebi.plan.passes import CPU_PASS_TOKENS, GPU_PASS_TOKENS, PassPlan, Room, choose, longest_row
from jebi.plan.places import best, reliefs
from jebi.plan.time import Load, StepTime, step_time


@dataclass(frozen=True)
class Job:
    """A training, as settings and rows say it."""

    held: Held
    """The model and its adapter."""
    longest: int
    """``max_seq_length``."""
    batch: int
    """Rows of an optimizer step: batch size times accumulation."""
    steps: int
    """Optimizer steps."""
    asked: Checkpointing | None = None
    """What layers keep, where the user says so."""
    places: Places = Places()  # noqa: RUF009  (frozen)
    """Where embedding and head are to be, as far as that is said."""
    row: float | None = None
    """Mean tokens of a row; None where all are as long as may be."""
    spread: float = 0.0
    """Standard deviation of a row's tokens."""
    learnt: float = 1.0
    """Share of the tokens that are learnt."""
    checkpoints: int = 0
    """Checkpoints that lie on disk."""

    @property
    def step_tokens(self) -> float:
        """Mean tokens of a step."""
        return self.batch * (self.row or self.longest)

    @property
    def most_tokens(self) -> int:
        """Tokens of a large step: two standard deviations above the mean."""
        most = self.step_tokens + 2 * self.spread * math.sqrt(self.batch)
        return max(1, min(self.batch * self.longest, math.ceil(most)))


@dataclass(frozen=True)
class Prediction:
    """What comes of a job on a card."""

    job: Job
    """The job."""
    card: Card
    """The card."""
    budget: int
    """Bytes it may take there."""
    fits: bool
    """Whether that is enough."""
    plan: PassPlan
    """What is chosen; where nothing fits, what takes the least."""
    places: Places
    """Where embedding and head are then."""
    items: tuple[Item, ...]
    """All that is held at the peak."""
    longest: int
    """Tokens of the longest row that fits."""
    step: StepTime
    """Time of a step."""

    @property
    def peak(self) -> int:
        """Bytes on the device at the peak, CUDA's context included."""
        return total(list(self.items))

    @property
    def timed(self) -> bool:
        """Whether the card's rates are known."""
        return math.isfinite(self.step.seconds)

    @property
    def missing(self) -> int:
        """Bytes that are missing where it does not fit."""
        return max(0, self.peak - self.budget)

    @property
    def rows_a_pass(self) -> int:
        """Rows of full length in one pass: the largest batch that is one pass; larger ones run in several."""
        return self.plan.tokens // self.job.longest

    @property
    def tokens_per_second(self) -> float:
        """By the predicted step."""
        return self.job.step_tokens / self.step.seconds

    @property
    def seconds(self) -> float:
        """Of all steps; loading and saving not counted."""
        return self.job.steps * self.step.seconds


def predict(job: Job, card: Card, budget: int, host: int = 0) -> Prediction:
    """What the trainer will choose within a budget, and what comes of it.

    Args:
        job: the training.
        card: where it runs.
        budget: bytes it may take on the device, CUDA's context included.
        host: free bytes of host memory for what leaves the card.
    """
    on_card = card.name != "cpu"
    held = replace(job.held, on_card=on_card, fp8=job.held.fp8 and card.fp8 is not None)
    options = reliefs(held.shape, held.element, job.places) if on_card else []
    start = _placed(held, job.places, on_card)
    held = replace(held, places=start)
    free = budget - total(model_items(held)) - total(adapter_items(held))
    free -= CONTEXT_BYTES if on_card else PROCESS_BYTES
    weights = kept_weight_bytes(held) if on_card else 0
    room = Room(free, weights, scratch_bytes(held), host if on_card else 0, on_card)
    limit = GPU_PASS_TOKENS if on_card else CPU_PASS_TOKENS
    # A step's rows are all that a pass can have.
    limit = min(limit, max(job.longest, _round(job.most_tokens)))

    def plan_of(free: Room) -> PassPlan:
        return choose(held.shape, held.element, free, job.longest, job.asked, limit)

    if options:
        relief, plan = best(options, 0, room, plan_of)
        room = replace(room, card=room.card + options[-1].frees)
        held = replace(held, places=_placed(held, relief.places, on_card))
    else:
        plan = plan_of(room)
    made = Pass(
        _filled(replace(job, held=held), plan), plan.checkpointing, plan.chunk, plan.keep_weights, plan.kept_layers
    )
    if not plan.fits:
        plan = replace(plan, tokens=made.tokens)
    items = everything(held, made, job.checkpoints)
    fits = plan.fits and total(items) <= budget
    passes = math.ceil(job.step_tokens / max(1, made.tokens))
    load = Load(job.step_tokens, job.row or job.longest, job.learnt, passes)
    longest = longest_row(held.shape, held.element, room, job.asked)
    return Prediction(
        job, card, budget, fits, plan, held.places, tuple(items), longest, step_time(held, made, load, card)
    )


def smallest(current: Prediction, others: Iterable[Prediction]) -> Prediction | None:
    """On the card with the least memory that holds it, the fastest of these; None where that is no other."""
    most = 0.97 * current.budget if current.fits else math.inf
    found = [each for each in others if each.fits and each.budget < most]
    return min(found, key=lambda each: (round(each.budget, -9), each.step.seconds), default=None)


def next_faster(current: Prediction, others: Iterable[Prediction]) -> Prediction | None:
    """On the card that is the next faster one, by a tenth at least."""
    found = [each for each in others if each.fits and each.step.seconds < 0.9 * current.step.seconds]
    return max(found, key=lambda each: each.step.seconds, default=None)


def remedies(current: Prediction, host: int) -> list[tuple[str, Prediction]]:
    """Settings, ready to paste, with which a job that does not fit would; the least change first."""
    job, held = current.job, current.job.held
    changes: list[tuple[str, Job]] = []
    if held.storage in ("dense", "int8"):
        changes.append(("model.load_in_4bit: true", replace(job, held=replace(held, storage="nf4"))))
    if job.asked is not None:
        changes.append(('use_gradient_checkpointing="auto"', replace(job, asked=None)))
    if job.places != Places():
        changes.append(("model.embedding: auto, model.head: auto", replace(job, places=Places())))
    if 128 <= current.longest < job.longest:
        length = current.longest // 128 * 128
        row = None if job.row is None else min(job.row, length)
        changes.append((f"model.max_seq_length: {length}", replace(job, longest=length, row=row)))
    tried = [(text, predict(changed, current.card, current.budget, host)) for text, changed in changes]
    return [(text, found) for text, found in tried if found.fits]


def _placed(held: Held, places: Places, on_card: bool) -> Places:
    """The places with nothing left open, as `models.placement.resolve` does it."""
    embedding, head = places.embedding, places.head
    if not on_card:
        return Places("card", head if head in ("nf4", "int8") else "card")
    if held.shape.tied and head not in ("nf4", "int8") and "host" in (embedding, head):
        return Places("host", "host")
    return Places("host" if embedding == "host" else "card", "card" if head == "auto" else head)


def _filled(job: Job, plan: PassPlan) -> int:
    """Tokens that a pass really has: whole rows, no more than a step's."""
    if job.row is None and plan.tokens >= job.longest:
        return min(plan.tokens // job.longest, job.batch) * job.longest
    most = _round(job.most_tokens) if job.held.on_card else job.most_tokens
    return min(max(plan.tokens, job.longest if not plan.fits else 1), most)


def _round(tokens: int) -> int:
    """Passes of a card are padded to multiples of 256."""
    return -(-tokens // 256) * 256
