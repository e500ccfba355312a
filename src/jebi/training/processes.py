"""A training's processes and cards: what it needs over several of them beside Trainer's own handling.

How a step's rows are dealt is `data.dealing`'s; what the processes make of them is added up in `reduction`.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from jebi.data.dealing import Ranks, digest
from jebi.data.passes import Batch
from jebi.errors import ConfigError, RankError
from jebi.models.hf import JebiForCausalLM
from jebi.plan.passes import PassPlan
from jebi.training.reduction import explained
from jebi.training.report import RankReport, Report


def suit(args: TrainingArguments, model: JebiForCausalLM) -> None:
    """Settle what is left open, and refuse what would make several processes another training than one.

    Raises:
        ConfigError: a setting is one of those.
    """
    args.dataloader_pin_memory = False  # Rows go to the card as passes, which are pinned.
    args.logging_nan_inf_filter = False  # Such a loss stops the run; to look for it at every batch waits for the card.
    if args.n_gpu > 1:
        args._n_gpu = 1  # One process trains on one card; Trainer would copy the model to all of them each step.
    if args.world_size > 1 and args.train_sampling_strategy == "batch_rebalance":
        raise ConfigError(
            "train_sampling_strategy 'batch_rebalance' has nothing left to do: there is no padding, and rows are dealt "
            "to processes by their tokens. Leave it 'random'."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ConfigError(
            "average_tokens_across_devices=False would weigh a row by the process that it is dealt to: leave it True."
        )


def ranks_of(args: TrainingArguments, model: JebiForCausalLM) -> Ranks:
    """The training's processes."""
    return Ranks(args.process_index, args.world_size, model.model.sharded and args.world_size > 1)


def require_plain(accelerator: Accelerator) -> None:
    """`ConfigError` where the launcher was told to shard by an engine that does not see into jebi's layers."""
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ConfigError(
            f"accelerate was configured for {kind}: start with torchrun, or accelerate launch --multi_gpu. A model too "
            "large for one card is loaded with shard=True (model.shard)."
        )


def summed(accelerator: Accelerator, *numbers: float) -> list[float]:
    """Each number summed over all processes; every one of them has to ask."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=accelerator.device)
    with explained():
        over_all: list[float] = accelerator.reduce(sums, "sum").tolist()
    return over_all


def agreed(accelerator: Accelerator, plan: PassPlan) -> PassPlan:
    """The plan with passes of the size that every process has room for."""
    if accelerator.num_processes == 1:
        return plan
    tokens = torch.tensor(plan.tokens, device=accelerator.device)
    with explained():
        dist.all_reduce(tokens, dist.ReduceOp.MIN)
    return replace(plan, tokens=int(tokens.item()))


def require_same_rows(accelerator: Accelerator, batches: list[Batch]) -> None:
    """Every process reads all rows, so that none is learnt twice or never.

    Raises:
        RankError: they read different ones.
    """
    if accelerator.num_processes == 1:
        return
    with explained():
        digests = accelerator.gather(torch.tensor([digest(batches)], device=accelerator.device))
    if len(set(digests.tolist())) > 1:
        raise RankError(
            "the processes of this training read different rows: every one of them must be given the same rows in the "
            "same order (they are dealt to the processes later), and the same seed."
        )


def whole_loader(
    dataset: Any,
    batch_size: int,
    sampler_of: Callable[[Any], Sampler[int] | None] | None,
    collate: Callable[[list[Any]], Batch],
    args: TrainingArguments,
) -> DataLoader[Any]:
    """A loader that gives every process the rows of all of them, ``batch_size`` in all, in the order that one has.

    Batches stay on the host, where they are cut; from the card they would be fetched back.

    Args:
        dataset: token rows, or a stream of them.
        batch_size: rows of a batch, of all processes.
        sampler_of: says in which order rows are read; a stream has its own.
        collate: makes a batch of rows.
        args: how many workers read.
    """
    settings: dict[str, Any] = {
        "num_workers": args.dataloader_num_workers,
        "persistent_workers": args.dataloader_persistent_workers,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "in_order": args.dataloader_in_order,
    }
    sampler = None if sampler_of is None or isinstance(dataset, IterableDataset) else sampler_of(dataset)
    if isinstance(sampler, BatchRebalanceSampler):
        settings["batch_sampler"] = sampler  # of a process alone
    else:
        settings |= {"batch_size": batch_size, "sampler": sampler, "drop_last": args.dataloader_drop_last}
    loader: DataLoader[Any] = DataLoader(dataset, collate_fn=collate, **settings)
    # One process to accelerate: nothing is left out of it. What is random about the order follows from the seed.
    whole: DataLoader[Any] = prepare_data_loader(
        loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=args.data_seed
    )
    return whole


def random_states(ranks: Ranks, write: Callable[[str], None], folder: Path) -> None:
    """Write the random states of all processes into ``folder`` from the first one, whose disk a checkpoint is on.

    Args:
        ranks: the processes.
        write: Trainer's own way, which writes this process's into a folder.
        folder: of the checkpoint, or of what is to become one.
    """
    if ranks.count == 1:
        write(str(folder))
        return
    with tempfile.TemporaryDirectory() as aside:
        write(aside)
        own = [(path.name, path.read_bytes()) for path in Path(aside).iterdir()]
    with explained():
        states = gather_object(own)
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for name, state in states:
            (folder / name).write_bytes(state)


@contextmanager
def counted_once(state: TrainerState, ranks: Ranks) -> Iterator[None]:
    """Within it every process counts the tokens of all, and Trainer adds these up."""
    before = state.num_input_tokens_seen
    yield
    state.num_input_tokens_seen = before + (state.num_input_tokens_seen - before) // ranks.count


def of_all(report: Report, ranks: Ranks, tokens: int) -> Report:
    """The report with what every process took; this one has run so many ``tokens``."""
    if ranks.count == 1:
        return report
    own = RankReport(report.before.device, report.peak_gb, tokens, report.predicted.get("peak_gb"))
    with explained():
        each = [RankReport(**rank) for rank in gather_object([asdict(own)])]
    return replace(report, ranks=each)
