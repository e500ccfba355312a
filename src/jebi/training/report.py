"""Memory and time of a run, before and after, with the tutorial's figures: on a card, or on the host without one.

On a card "reserved" is what torch's allocator holds; on the host it is the process's resident set, whose peak Linux
keeps (VmHWM) and lets a process reset. Gigabytes are 2**30 bytes, as in the tutorial.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from jebi.plan.measured import processor_name
from jebi.training.checkpoints import write_whole

_GB = 2**30
_STEPS = 200
"""Steps at the end by which a step is timed."""
_FIRST = 2
"""Steps at the beginning that are not."""


@dataclass(frozen=True)
class MemoryBefore:
    """The card or host as training begins."""

    device: str
    """Name of the card, or of the processor."""
    total_gb: float
    """Its memory."""
    reserved_gb: float
    """What this process holds of it already: the model, mostly."""

    def text(self) -> str:
        """Two lines, in the tutorial's words."""
        return (
            f"Device = {self.device}. Max memory = {self.total_gb:.3f} GB.\n"
            f"{self.reserved_gb:.3f} GB of memory reserved."
        )


@dataclass(frozen=True)
class RankReport:
    """What one of several processes took."""

    device: str
    """Name of its card, or of the processor."""
    peak_gb: float
    """Most memory reserved at any time."""
    tokens: int
    """Tokens that it ran: of the rows that were dealt to it, and of passes that only keep step with the others."""
    predicted_gb: float | None = None
    """What was predicted of that memory."""

    def text(self, number: int) -> str:
        """A line about the process of that number."""
        predicted = "" if self.predicted_gb is None else f"; predicted were {self.predicted_gb:.3f}"
        return f"Process {number}: {self.tokens:,} tokens, peak reserved memory {self.peak_gb:.3f} GB{predicted}."


@dataclass(frozen=True)
class Report:
    """What a training took; of several processes, what the first one took, but for `tokens` and `ranks`."""

    before: MemoryBefore
    """Memory as it began."""
    seconds: float
    """Wall time of the training."""
    peak_gb: float
    """Most memory reserved at any time during it."""
    steps: int
    """Optimizer steps made."""
    tokens: int
    """Tokens of the rows trained on, by all processes; there is no padding to leave out."""
    plan: dict[str, Any]
    """What was chosen: tokens a pass, what layers keep, where embedding and head are."""
    ranks: list[RankReport] = field(default_factory=list)
    """What each of several processes took, in their order; empty where there is one."""
    predicted: dict[str, Any] = field(default_factory=dict)
    """What was predicted at the beginning: the peak, its parts, and, where rates are known, seconds of a step."""
    step_seconds: float | None = None
    """Median of the steps but for the first ones, in which kernels are compiled and passes captured."""

    @property
    def minutes(self) -> float:
        """The same in minutes."""
        return self.seconds / 60

    @property
    def training_gb(self) -> float:
        """The part of the peak that training added."""
        return self.peak_gb - self.before.reserved_gb

    @property
    def peak_percent(self) -> float:
        """The peak as a percentage of the device's memory."""
        return 100 * self.peak_gb / self.before.total_gb

    @property
    def training_percent(self) -> float:
        """The training's part as a percentage of the device's memory."""
        return 100 * self.training_gb / self.before.total_gb

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second, everything included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def text(self) -> str:
        """The tutorial's lines."""
        lines = (
            f"{self.seconds:.1f} seconds used for training.\n"
            f"{self.minutes:.2f} minutes used for training.\n"
            f"{self.tokens_per_second:,.0f} tokens a second ({self.tokens:,} tokens, {self.steps} steps).\n"
            f"Peak reserved memory = {self.peak_gb:.3f} GB.\n"
            f"Peak reserved memory for training = {self.training_gb:.3f} GB.\n"
            f"Peak reserved memory % of max memory = {self.peak_percent:.3f} %.\n"
            f"Peak reserved memory for training % of max memory = {self.training_percent:.3f} %."
        ) + "".join(f"\n{rank.text(number)}" for number, rank in enumerate(self.ranks))
        if "peak_gb" in self.predicted:
            lines += f"\nPredicted peak reserved memory = {self.predicted['peak_gb']:.3f} GB."
        if self.step_seconds is not None:
            lines += f"\nA step took {self.step_seconds:.3f} s"
            predicted = self.predicted.get("step_seconds")
            lines += "." if predicted is None else f"; predicted were {predicted:.3f} s."
        return lines

    def write(self, path: Path, log_history: list[dict[str, Any]]) -> None:
        """Write ``report.json``: the figures, the derived ones, and the trainer's log with the loss curve."""
        derived = ("minutes", "training_gb", "peak_percent", "training_percent", "tokens_per_second")
        document = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        document["log"] = log_history
        write_whole(path, json.dumps(document, indent=2) + "\n")


class Meter:
    """Measures one training: made as it begins, read as it ends."""

    def __init__(self, device: torch.device):
        self._device = device
        _reset_peak(device)
        self.before = memory_before(device)
        self._started = time.perf_counter()
        self._steps: deque[Any] = deque(maxlen=_STEPS)
        self._first = _FIRST

    def step(self) -> None:
        """Another step's passes are on their way; on a card their time is the card's."""
        if self._first:
            self._first -= 1
            return
        on_card = self._device.type == "cuda"
        self._steps.append(torch.cuda.Event(enable_timing=True) if on_card else time.perf_counter())
        if on_card:
            self._steps[-1].record()

    def _step_seconds(self) -> float | None:
        if len(self._steps) < 2:
            return None
        if self._device.type != "cuda":
            return float(statistics.median(after - before for before, after in pairwise(self._steps)))
        torch.cuda.synchronize(self._device)
        return float(statistics.median(before.elapsed_time(after) / 1000 for before, after in pairwise(self._steps)))

    def report(self, steps: int, tokens: int, plan: dict[str, Any], predicted: dict[str, Any]) -> Report:
        """The figures until now."""
        seconds, peak = time.perf_counter() - self._started, _peak_bytes(self._device) / _GB
        return Report(
            self.before, seconds, peak, steps, tokens, plan, predicted=predicted, step_seconds=self._step_seconds()
        )


def memory_before(device: torch.device) -> MemoryBefore:
    """The device's name and memory now."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        reserved = torch.cuda.memory_reserved(device)
        return MemoryBefore(properties.name, properties.total_memory / _GB, reserved / _GB)
    return MemoryBefore(processor_name(), psutil.virtual_memory().total / _GB, psutil.Process().memory_info().rss / _GB)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        # What loading freed is not the training's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # Not Linux, or not allowed: the peak is then the process's since its start.


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
