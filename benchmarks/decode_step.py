"""Where a decoding step's time goes on a card: what each product reads a second, and every kernel by its time.

`decode.py` runs it with ``--kernels`` and ``--profile``. Products are timed over all layers in one captured round, so
that no weight is found in the cache; bytes are those of weights and scales, read once.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decode import answered
from few_rows import microseconds, nbytes
from jebi.kernels import few_rows
from jebi.kernels.low_rank import LowRank
from jebi.models.hf import JebiForCausalLM
from jebi.nn.few_rows_group import FewRowsGroup
from kernels import copy_bandwidth

NAMES = ("qkv", "o", "gate_up", "down")
STEPS = 24


@torch.no_grad()
def bandwidths(model: JebiForCausalLM, rows: list[int]) -> list[dict[str, Any]]:
    """For every number of rows each product of a layer and the head: microseconds, GB/s and share of a copy's."""
    copied, lines = copy_bandwidth(model.device, 2**30), []
    layers = list(model.model.decoder_layers())
    head = model.lm_head.weight
    for count in rows:
        for number, name in enumerate(NAMES):
            groups = [layer.few_rows[number] for layer in layers if layer.few_rows is not None]
            took = microseconds([_product(group, count, name) for group in groups])
            lines.append(_line(name, count, took, statistics.mean(nbytes(group.weight) for group in groups), copied))
        x = torch.randn(count, model.lm_head.in_features, dtype=model.dtype, device=model.device)
        if isinstance(head, Tensor):
            took = microseconds([lambda x=x: model.logits_of(x)] * 8)
            lines.append(_line("head", count, took, head.nbytes, copied))
    return lines


def _product(group: FewRowsGroup, rows: int, name: str) -> Callable[[], object]:
    weight, casts = group.weight, group.group.casts()
    dtype, device = group.group.dtype, group.group.maps[0].device()
    x = torch.randn(rows, weight.shape[1], dtype=dtype, device=device)
    laid, thin = few_rows.normed_and_compressed(x, None, casts and casts[0])[0], None
    if casts is not None:
        left = torch.randn(rows, casts[1].shape[1], dtype=dtype, device=device)
        thin = LowRank(left, casts[1].t())
    residual = torch.randn(rows, weight.shape[0], dtype=dtype, device=device) if name in ("o", "down") else None
    kind: Any = "silu" if name == "gate_up" else None
    return lambda: few_rows.product(laid, weight, None, thin, kind, 1.0, residual)


def _line(name: str, rows: int, took: float, size: float, copied: float) -> dict[str, Any]:
    speed = size / took / 1e3
    figures = {"us": round(took, 2), "gb_s": round(speed), "of_copy": round(speed / copied, 3)}
    return {"product": name, "rows": rows, **figures, "copy_gb_s": round(copied)}


def profiled(model: JebiForCausalLM, ids: Tensor) -> list[str]:
    """Every kernel of a step: how often, microseconds each and in all; the longest first."""

    def run(new: int) -> dict[str, tuple[int, float]]:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            answered(model, ids, new)
            torch.cuda.synchronize()
        return {event.key: (event.count, event.self_device_time_total) for event in profile.key_averages()}

    one, more = run(1), run(1 + STEPS)
    lines, total = [], 0.0
    for name, (count, took) in more.items():
        often, spent = (now - before for now, before in zip((count, took), one.get(name, (0, 0.0))))
        if often > 0 and spent > 0:
            total += spent / STEPS
            lines.append(
                (spent / STEPS, f"{often / STEPS:7.1f} x {spent / often:8.2f} us = {spent / STEPS:8.1f}  {name[:90]}")
            )
    head = f"{len(ids)} rows, a step after {ids.shape[1]} tokens: {total:.0f} us of kernels"
    return [head, *(line for _, line in sorted(lines, reverse=True)[:30])]
