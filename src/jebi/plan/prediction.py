"""What a run will be on a card: chosen as the trainer will choose, its memory, its time, and what else is possible.

Everything is made of `inventory`, `passes`, `places` and `time`; how it is shown is the command's. No torch here.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jebi.config import EmbeddingPlace, HeadPlace, LoraConfig, Places
from jebi.config.launched import World
from jebi.plan.cards import Card
from jebi.plan.held import Held
from jebi.plan.inventory import (
    CONTEXT_BYTES,
    OPTIMIZERS_8BIT,
    PROCESS_BYTES,
    Item,
    adapter_items,
    everything,
    model_items,
    total,
)
from jebi.plan.jobs import Job
from jebi.plan.passes import CPU_PASS_TOKENS, GPU_PASS_TOKENS, PassPlan, Room, choose, longest_row, room_beside
from jebi.plan.places import best, reliefs
from jebi.plan.ranks import MACHINES, StepBytes, efficiency, step_bytes
from jebi.plan.time import StepTime, carried_bytes, step_time


@dataclass(frozen=True)
class Prediction:
    """What comes of a job on a card; of several processes, on the card of each."""

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
    def step_tokens(self) -> float:
        """Mean tokens of a step's rows, of all processes."""
        return self.job.held.world.ranks * self.job.step_tokens

    @property
    def sent(self) -> StepBytes:
        """What each of several processes sends in a step."""
        return step_bytes(self.job.held, self.job.load(self.job.filled(self.plan.tokens)).passes)

    @property
    def efficiency(self) -> float:
        """Speed of several processes over as many times that of one."""
        return efficiency(self.step.seconds - self.step.links, self.step.links)

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, by the predicted step."""
        return self.step_tokens / self.step.seconds

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
        host: free bytes of host memory for what leaves the card, of one process.
    """
    on_card = card.name != "cpu"
    held = replace(job.held, on_card=on_card, fp8=job.held.fp8 and card.fp8 is not None)
    places = _movable(held, job.places)
    options = reliefs(held.shape, held.element, places) if on_card else []
    held = replace(held, places=places.settled(held.shape.tied, on_card))
    free = budget - total(model_items(held)) - total(adapter_items(held))
    free -= CONTEXT_BYTES if on_card else PROCESS_BYTES
    room = room_beside(held, free, host, carried_bytes(held, card) if on_card else 0)
    limit = job.pass_limit(GPU_PASS_TOKENS if on_card else CPU_PASS_TOKENS)

    def plan_of(free: Room) -> PassPlan:
        return choose(held.shape, held.element, free, job.largest, job.asked, limit, job.row is None)

    if options:
        relief, plan = best(options, 0, room, plan_of)
        room = replace(room, card=room.card + options[-1].frees)
        held = replace(held, places=relief.places.settled(held.shape.tied, on_card))
    else:
        plan = plan_of(room)
    if job.pass_tokens is not None:
        plan = replace(plan, tokens=job.pass_tokens)
    made = plan.made(replace(job, held=held).filled(plan.tokens), job.sizes)
    if not plan.fits:
        plan = replace(plan, tokens=made.tokens)
    items = everything(held, made, job.checkpoints)
    fits = plan.fits and total(items) <= budget
    longest = longest_row(held.shape, held.element, room, job.asked)
    # In float32 products run on other units, whose rates are not known.
    rates = replace(card, products=math.nan) if on_card and held.element == 4 else card
    step = step_time(held, made, job.load(made.tokens), rates)
    return Prediction(replace(job, held=held), card, budget, fits, plan, held.places, tuple(items), longest, step)


def smallest(current: Prediction, others: Iterable[Prediction]) -> Prediction | None:
    """On the card with the least memory that holds it, the fastest of these; None where that is no other."""
    most = 0.97 * current.budget if current.fits else math.inf
    found = [each for each in others if each.fits and each.budget < most]
    return min(found, key=lambda each: (round(each.budget, -9), each.step.seconds), default=None)


def next_faster(current: Prediction, others: Iterable[Prediction]) -> Prediction | None:
    """On the card that is the next faster one, by a tenth at least."""
    found = [each for each in others if each.fits and each.step.seconds < 0.9 * current.step.seconds]
    return max(found, key=lambda each: each.step.seconds, default=None)


def over_more(current: Prediction, host: int) -> Prediction | None:
    """With its layers divided among the fewest more cards of one machine that hold it; None where none do."""
    job, before = current.job, current.job.held.world
    if not (job.held.divisible and job.held.on_card):
        return None
    for count in MACHINES:
        if count > before.ranks:
            shared = replace(job, held=replace(job.held, world=World(count, count, shard=True)))
            found = predict(shared, current.card, current.budget, host * before.here // count)
            if found.fits:
                return found
    return None


def remedies(current: Prediction, host: int) -> list[tuple[tuple[str, ...], Prediction]]:
    """Settings ``section.key=value`` with which a job that does not fit would, the least change first.

    Each by itself; where none is enough by itself, the first of them that are enough together.
    """
    made: list[tuple[tuple[str, ...], Prediction]] = []
    together, settings = current, tuple[str, ...]()
    changes = (
        _fewer_bits, _adapter, _small_optimizer, _own_choice, _own_places, _own_passes, _shared_layers, _shorter,
    )  # fmt: skip
    for change in changes:
        if (found := change(current)) is not None:
            tried = predict(found[1], current.card, current.budget, host)
            made += [(found[0], tried)] if tried.fits else []
        # After those before it, which may have made room for longer rows.
        if not together.fits and (more := change(together)) is not None:
            together = predict(more[1], current.card, current.budget, host)
            settings += more[0]
    return made or ([(settings, together)] if together.fits else [])


_Change = tuple[tuple[str, ...], Job] | None


def _fewer_bits(found: Prediction) -> _Change:
    job = found.job
    if job.held.storage not in ("dense", "int8"):
        return None
    # Both settings, since they exclude each other.
    before = ("model.load_in_8bit=false",) if job.held.storage == "int8" else ()
    return (*before, "model.load_in_4bit=true"), replace(job, held=replace(job.held, storage="nf4"))


def _adapter(found: Prediction) -> _Change:
    job = found.job
    if job.held.storage != "masters":
        return None
    held = replace(job.held, storage="nf4", lora=LoraConfig())
    return ("model.full_finetuning=false", "model.load_in_4bit=true"), replace(job, held=held)


def _small_optimizer(found: Prediction) -> _Change:
    job = found.job
    if job.held.optimizer in OPTIMIZERS_8BIT:
        return None
    return ("train.optim=adamw_8bit",), replace(job, held=replace(job.held, optimizer="adamw_8bit"))


def _own_choice(found: Prediction) -> _Change:
    if found.job.asked is None:
        return None
    return ("train.gradient_checkpointing=false",), replace(found.job, asked=None)


def _own_places(found: Prediction) -> _Change:
    if found.job.places == Places() or not found.job.held.on_card:
        return None
    return ("model.embedding=auto", "model.head=auto"), replace(found.job, places=Places())


def _shared_layers(found: Prediction) -> _Change:
    held = found.job.held
    shared = replace(held, world=replace(held.world, shard=True))
    if not held.divisible or held.world.shard or shared.world.shares == 1:
        return None
    return ("model.shard=true",), replace(found.job, held=shared)


def _own_passes(found: Prediction) -> _Change:
    if found.job.pass_tokens is None:
        return None
    return ("train.pass_tokens=null",), replace(found.job, pass_tokens=None)


def _shorter(found: Prediction) -> _Change:
    job = found.job
    length = found.longest // 128 * 128
    if not 128 <= length < job.longest:
        return None
    row = None if job.row is None else min(job.row, length)
    return (f"model.max_seq_length={length}",), replace(job, longest=length, row=row)


def _movable(held: Held, places: Places) -> Places:
    """As `models.placement.movable` has it: tables that are trained stay on the card."""
    trained = held.trained_tables
    embedding: EmbeddingPlace = "card" if "embed_tokens" in trained and places.embedding == "auto" else places.embedding
    head: HeadPlace = "card" if "lm_head" in trained and places.head == "auto" else places.head
    return Places(embedding, head)
