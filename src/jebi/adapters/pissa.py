"""PiSSA: an adapter that starts at the principal components of the weight (arXiv:2404.02948).

There those components are taken out of the base. Here the base stays as it is stored, 4-bit too, and the adapter
carries them frozen and negative (`Lora.freeze_start`), which is the same map. As a file that is a plain LoRA of twice
the rank, which PEFT reads on the ordinary base, and which PEFT itself writes for
``path_initial_model_for_weight_conversion``.
"""

from pathlib import Path

from jebi.adapters.low_rank import best_factors, near_factors, require_rank
from jebi.errors import AdapterError
from jebi.models.shell import JebiPreTrainedModel
from jebi.nn.linear import Linear


def start(path: str, linear: Linear, method: str, seed: int) -> None:
    """Start the adapter of the projection at ``path``; the map stays what it was.

    Args:
        path: its name, for the error.
        linear: the projection.
        method: ``pissa``, or ``pissa_niter_N`` for N rounds of a randomised decomposition.
        seed: of those rounds.

    Raises:
        ConfigError: the rank exceeds the weight's.
    """
    rank, lora = require_rank(path, linear, method), linear.lora
    assert lora is not None
    _, _, rounds = method.partition("_niter_")
    weight_NK = linear.dense()
    A_rK, B_Nr = near_factors(weight_NK, rank, int(rounds), seed) if rounds else best_factors(weight_NK, rank)
    lora.freeze_start(A_rK * lora.scale**-0.5, B_Nr * lora.scale**-0.5)


def require_dense(model: JebiPreTrainedModel, folder: Path) -> None:
    """For PEFT's own files, whose adapter counts on weights that it was taken out of before they lost any bits.

    Raises:
        AdapterError: the model's weights are quantised.
    """
    if model.packed_values():
        raise AdapterError(
            f"adapter '{folder}' takes its start out of the weights (init_lora_weights='pissa'), which 4-bit ones "
            "would not survive: load the base with load_in_4bit=False, or let PEFT convert the adapter "
            "(path_initial_model_for_weight_conversion)."
        )
