"""AdamW with 8-bit block-wise moments, as a ``torch.optim.Optimizer`` that is quick with many small tensors.

Parameters that take the same step are laid out end to end in *buckets*, each tensor starting a new block of
256, and a bucket is updated at once: a LoRA's hundreds of little matrices cost a few dozen operations. The
arithmetic is ``kernels.adamw8bit``'s; what this file adds is the layout, the state and its saving.

Shape suffix: T values of a bucket, padding included.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from transformers import TrainingArguments

from jebi.errors import ConfigError
from jebi.kernels import adamw8bit
from jebi.kernels.adamw8bit import BLOCK, Moments8, Moments32, Rates
from jebi.training.flat import padded, starts_of, stretch_of


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with 8-bit moments (arXiv:2110.02861), bitsandbytes' ``AdamW8bit``.

    Results are those of bitsandbytes 0.50 on CPU to the bit; elsewhere they differ where ``dynamic8`` says.
    Parameters are float32, bfloat16 or float16, on any device; a group may override any setting. Tensors of
    fewer than ``min_8bit_size`` values keep float32 moments. ``percentile_clipping`` is off.

    A parameter's state is ``step`` (int) and ``state1``, ``state2`` in its shape: uint8 with ``absmax1``,
    ``absmax2`` (float32, one a block of 256), or float32 without them. State tensors are views of their
    bucket; saving and loading them, ``weights_only`` too, continues a run bit for bit.

    Raises ``ConfigError`` for a setting out of range, a sparse gradient, and a state dict of something else.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults["min_8bit_size"] = min_8bit_size
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        super().__init__(params, defaults)
        for group in self.param_groups:
            _check_settings(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied or unpickled state; its buckets are laid out anew at the next step."""
        super().__setstate__(state)
        self._buckets = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict()``; tensors keep their dtypes and are copied to their parameters' devices."""
        # torch would cast the state to the parameters' dtypes, which destroys codes and scales alike.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            if number in state_dict["state"]:
                self.state[param] = _checked_copy(state_dict["state"][number], param)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return the loss of ``closure``, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        used = {}
        for group in self.param_groups:
            for step, params in self._due(group):
                key = tuple(map(id, params))
                bucket = self._buckets.get(key)
                if bucket is None or not self._holds_state(bucket):
                    bucket = self._pack(params, eight_bit=self._is_eight_bit(params[0], group))
                used[key] = bucket
                _update(bucket, _rates(group, step))
                for param in params:
                    self.state[param]["step"] = step
        # A bucket left out of a step would be stale after its parameters are packed another way.
        self._buckets = used
        return loss

    def _due(self, group: dict[str, Any]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the steps to take, and in batches of bucket size the parameters that take them."""
        ready: dict[tuple[torch.device, bool, int], list[Tensor]] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout is not torch.strided:
                raise ConfigError("AdamW8bit takes no sparse gradients; set sparse=False in the embedding")
            step = self.state[param].get("step", 0) + 1
            key = (param.device, self._is_eight_bit(param, group), step)
            ready.setdefault(key, []).append(param)
        for (device, _, step), params in ready.items():
            for batch in _batches(params, _stretch(device)):
                yield step, batch

    def _is_eight_bit(self, param: Tensor, group: dict[str, Any]) -> bool:
        state = self.state[param]
        return "absmax1" in state if state else param.numel() >= group["min_8bit_size"]

    def _holds_state(self, bucket: "_Bucket") -> bool:
        return all(self.state[param].get("state1") is view for param, view in zip(bucket.params, bucket.views))

    def _pack(self, params: list[Tensor], eight_bit: bool) -> "_Bucket":
        """Lay ``params`` out in a new bucket and move their state, if they have any, into it."""
        starts, size = starts_of(params)
        moments = _empty_moments(size, params[0].device, eight_bit)
        for param, start in zip(params, starts):
            state = self.state[param]
            for name, whole in vars(moments).items():
                if name.startswith("absmax"):
                    part = whole[start // BLOCK : (start + padded(param)) // BLOCK]
                else:
                    part = whole[start : start + param.numel()].view(param.shape)
                if name in state:
                    part.copy_(state[name])
                state[name] = part
        padding = [torch.arange(start + param.numel(), start + padded(param)) for param, start in zip(params, starts)]
        views = [self.state[param]["state1"] for param in params]
        return _Bucket(params, starts, size, moments, torch.cat(padding).to(params[0].device), views)


@dataclass(frozen=True)
class _Bucket:
    """Parameters laid end to end: where each starts, the values in all, and which of them are padding."""

    params: list[Tensor]
    starts: list[int]
    size: int
    moments: Moments8 | Moments32
    padding: Tensor
    views: list[Tensor]  # the parameters' `state1`; another tensor in a state means a state from elsewhere


def _update(bucket: _Bucket, rates: Rates) -> None:
    """Take one step for all parameters of a bucket, a stretch at a time (a large parameter has several)."""
    if isinstance(bucket.moments, Moments8):
        # Padding has to stay out of its block's scale, and 0 does not round to itself in 8 bits.
        bucket.moments.state1.index_fill_(0, bucket.padding, adamw8bit.ZERO_CODE_1)
        bucket.moments.state2.index_fill_(0, bucket.padding, adamw8bit.ZERO_CODE_2)
    there = _laid_flat(bucket)
    if there is not None:
        _step_stretch(*there, bucket.moments, 0, rates)
        # What was written through another tensor has changed too, for those who cast it once a step.
        torch.autograd.graph.increment_version(bucket.params)
        return
    flats = [param.contiguous().view(-1) for param in bucket.params]
    grads = [param.grad.reshape(-1) for param in bucket.params if param.grad is not None]
    device = bucket.params[0].device
    stretch = _stretch(device) if len(bucket.params) == 1 else bucket.size
    for begin in range(0, bucket.size, stretch):
        end = min(begin + stretch, bucket.size)
        param_T, grad_T = torch.zeros(2, end - begin, dtype=torch.float32, device=device)
        spans = [
            (max(begin - start, 0), min(end - start, flat.numel()), start - begin)
            for flat, start in zip(flats, bucket.starts)
        ]
        params = [flat[low:high] for flat, (low, high, _) in zip(flats, spans)]
        places = [param_T[low + shift : high + shift] for low, high, shift in spans]
        torch._foreach_copy_(places, params)
        torch._foreach_copy_(
            [grad_T[low + shift : high + shift] for low, high, shift in spans],
            [grad[low:high] for grad, (low, high, _) in zip(grads, spans)],
        )
        _step_stretch(param_T, grad_T, bucket.moments, begin, rates)
        torch._foreach_copy_(params, places)
    for param, flat in zip(bucket.params, flats):
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))


def _laid_flat(bucket: _Bucket) -> tuple[Tensor, Tensor] | None:
    """Parameters and gradients as they lie in memory, where both are laid out as the bucket is (`training.flat`)."""
    param_T = stretch_of(bucket.params, bucket.starts, bucket.size)
    grads = [param.grad for param in bucket.params if param.grad is not None]
    grad_T = stretch_of(grads, bucket.starts, bucket.size) if param_T is not None else None
    return (param_T, grad_T) if param_T is not None and grad_T is not None else None


def _step_stretch(param_T: Tensor, grad_T: Tensor, moments: Moments8 | Moments32, begin: int, rates: Rates) -> None:
    end = begin + param_T.numel()
    state1, state2 = moments.state1[begin:end], moments.state2[begin:end]
    if isinstance(moments, Moments32):
        adamw8bit.adamw32_(param_T, grad_T, Moments32(state1, state2), rates)
        return
    blocks = slice(begin // BLOCK, end // BLOCK)
    part = Moments8(state1, state2, moments.absmax1[blocks], moments.absmax2[blocks])
    adamw8bit.adamw8bit_(param_T, grad_T, part, rates)


def _batches(params: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Split into runs of at most ``size`` values; a larger parameter is a run of its own."""
    batch: list[Tensor] = []
    filled = 0
    for param in params:
        if batch and filled + padded(param) > size:
            yield batch
            batch, filled = [], 0
        batch.append(param)
        filled += padded(param)
    if batch:
        yield batch


def _stretch(device: torch.device) -> int:
    """Values updated at a time: what a CPU's cache holds; elsewhere as many as keep launches few and copies small."""
    return 1 << 19 if device.type == "cpu" else 1 << 24


def _empty_moments(size: int, device: torch.device, eight_bit: bool) -> Moments8 | Moments32:
    def zeros(count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    if not eight_bit:
        return Moments32(zeros(size, torch.float32), zeros(size, torch.float32))
    codes = zeros(size, torch.uint8), zeros(size, torch.uint8)
    return Moments8(*codes, zeros(size // BLOCK, torch.float32), zeros(size // BLOCK, torch.float32))


def _rates(group: dict[str, Any], step: int) -> Rates:
    beta1, beta2 = group["betas"]
    return Rates(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], step)


def adam_settings(args: TrainingArguments) -> dict[str, Any]:
    """What a trainer's arguments say of Adam, beside the weight decay, which is its groups'."""
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def tell_of_steps(optimizer: torch.optim.Optimizer) -> None:
    """Raise the versions of parameters that a step changed, for those who cast them once a step (`nn.group`).

    torch's fused optimizers and bitsandbytes' write into memory without raising them.
    """

    def tell(stepped: torch.optim.Optimizer, *_: Any) -> None:
        changed = [p for group in stepped.param_groups for p in group["params"] if p.grad is not None]
        torch.autograd.graph.increment_version(changed)

    optimizer.register_step_post_hook(tell)


def set_mode(optimizer: Any, mode: str) -> None:
    """Optimizers without a schedule have a mode for training and one for evaluation; others have none."""
    if callable(switch := getattr(optimizer, mode, None)):
        switch()


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0.0:
            raise ConfigError(f"{name} is {group[name]}; it must not be negative")
    if not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        raise ConfigError(f"betas are {group['betas']}; both must lie in [0, 1)")


def _checked_copy(saved: dict[str, Any], param: Tensor) -> dict[str, Any]:
    eight_bit = "absmax1" in saved
    names = {field.name for field in fields(Moments8 if eight_bit else Moments32)} | {"step"}
    if saved.keys() != names or saved["state1"].shape != param.shape:
        raise ConfigError(
            "the optimizer state was saved by another optimizer or for other parameters; resume with the "
            "settings of the saved run, or start without its optimizer state"
        )
    return {
        name: value.to(param.device, copy=True) if isinstance(value, Tensor) else value for name, value in saved.items()
    }
