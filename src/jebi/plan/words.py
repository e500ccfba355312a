"""A plan in words, for the command and for the line at the start of a training."""

from collections.abc import Iterable

from jebi.config import Checkpointing, Places
from jebi.plan.jobs import Job
from jebi.plan.passes import PassPlan

_KEPT: dict[Checkpointing, str] = {
    "none": "all activations kept",
    "keep_attention": "attention's output kept, the rest recomputed",
    "recompute": "activations recomputed",
    "offload": "activations recomputed from host memory",
}
_PYTHON = {"true": "True", "false": "False", "null": "None"}


def words(plan: PassPlan, places: Places, job: Job) -> str:
    """What was chosen."""
    # A longer row is a pass by itself.
    parts = [f"passes of {max(plan.tokens, job.longest):,} tokens", _KEPT[plan.checkpointing]]
    if plan.kept_layers:
        parts[-1] += f" but in {plan.kept_layers} of {len(job.held.shape.layers)} layers"
    if plan.shipped_layers:
        parts.append(f"gate and up of {plan.shipped_layers} there too")
    if job.held.packed and job.held.on_card:
        parts.append("weights dequantised once" if plan.keep_weights else "weights dequantised at every use")
    if job.held.world.shares > 1:
        parts.append(f"layers in {job.held.world.shares} parts")
    moved = [name for name, at in (("embedding", places.embedding), ("head", places.head)) if at == "host"]
    if moved:
        parts.append(f"{' and '.join(moved)} in host memory")
    return ", ".join(parts)


def pasted(settings: Iterable[str]) -> str:
    """Settings as they are put behind ``jebi train`` and ``jebi plan``."""
    return " ".join(f"--set {setting}" for setting in settings)


def keywords(settings: Iterable[str]) -> str:
    """The same as a script passes them."""
    texts = []
    for setting in settings:
        name, _, value = setting.rpartition(".")[2].partition("=")
        if name == "gradient_checkpointing":
            name, value = "use_gradient_checkpointing", "auto"
        python = _PYTHON.get(value) or (value if value.isdigit() else f'"{value}"')
        texts.append(f"{name}={python}")
    return ", ".join(texts)
