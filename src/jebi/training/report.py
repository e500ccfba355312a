"""Memory and time of a run, before and after, with the tutorial's figures: on a card, or on the host without one.

On a card "reserved" is what torch's allocator holds; on the host it is the process's resident set, whose peak Linux
keeps (VmHWM) and lets a process reset. Gigabytes are 2**30 bytes, as in the tutorial.
"""

import dataclasses
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from jebi.training.checkpoints import write_whole

_GB = 2**30


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
class Report:
    """What a training took."""

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
    predicted: dict[str, Any] = field(default_factory=dict)
    """What was predicted at the beginning: the peak, its parts, and on a known card seconds of a step."""

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
        )
        if "peak_gb" not in self.predicted:
            return lines
        return f"{lines}\nPredicted peak reserved memory = {self.predicted['peak_gb']:.3f} GB."

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

    def report(self, steps: int, tokens: int, plan: dict[str, Any], predicted: dict[str, Any]) -> Report:
        """The figures until now."""
        seconds = time.perf_counter() - self._started
        return Report(self.before, seconds, _peak_bytes(self._device) / _GB, steps, tokens, plan, predicted)


def memory_before(device: torch.device) -> MemoryBefore:
    """The device's name and memory now."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        reserved = torch.cuda.memory_reserved(device)
        return MemoryBefore(properties.name, properties.total_memory / _GB, reserved / _GB)
    return MemoryBefore(_processor(), psutil.virtual_memory().total / _GB, psutil.Process().memory_info().rss / _GB)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {psutil.cpu_count()} threads"


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
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
