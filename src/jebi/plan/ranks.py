"""Several processes on paper: bytes that each holds, bytes that a step sends over the links, and what that costs.

Everything follows from the model's shape: how weights are held (`quant`), what is divided (`nn.sharding`) and what is
averaged once a step (`training.reduction`).
"""

from dataclasses import dataclass

from jebi.config import Storage
from jebi.models.families import DecoderShape
from jebi.nn.shape import LayerShape
from jebi.nn.sharding import WHOLE_LAYERS
from jebi.plan.inventory import trained
from jebi.quant.footprint import weight_bytes

TRAVELLING = 2
"""Numbers that travel behind the gradients: the loss, and whether to stop."""


@dataclass(frozen=True)
class RankBytes:
    """What one process holds before any activation."""

    divided: int
    """Its part of the layers' frozen weights: all of them where they are not divided."""
    whole: int
    """Layers that are there whole at a time, where they are divided."""
    tables: int
    """Embedding and head, which every process has."""
    trained: int
    """The adapter, its gradients and the optimizer's moments, which every process has."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.divided + self.whole + self.tables + self.trained


@dataclass(frozen=True)
class StepBytes:
    """What one process sends in an optimizer step, and receives as much of."""

    reduced: int
    """Of gradients, all of whose passes are done."""
    gathered: int
    """Of weights, while layers are computed; 0 where they are not divided."""


@dataclass(frozen=True)
class Link:
    """What connects two processes."""

    name: str
    bytes_s: float
    """Bytes a second in each direction."""
    delay_s: float
    """Before a message's first byte arrives."""


def maps_of(layer: LayerShape) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's seven maps."""
    q, k, v = layer.qkv_sizes
    up = [(layer.width, layer.ffn)] * 2
    return [*((layer.width, outputs) for outputs in (q, k, v)), (q, layer.width), *up, (layer.ffn, layer.width)]


def adapter_values(shape: DecoderShape, rank: int) -> int:
    """Trained numbers of an adapter of that rank on all seven maps of every layer."""
    return sum(rank * (inputs + outputs) for layer in shape.layers for inputs, outputs in maps_of(layer))


def layer_bytes(shape: DecoderShape, storage: Storage, element: int) -> int:
    """Frozen bytes of one layer's maps."""
    return sum(weight_bytes(storage, inputs * outputs, element) for inputs, outputs in maps_of(shape.layer))


def rank_bytes(shape: DecoderShape, storage: Storage, element: int, rank: int, ranks: int, shard: bool) -> RankBytes:
    """What each of ``ranks`` processes of one machine holds.

    Args:
        shape: the decoder.
        storage: how the layers' frozen weights are held.
        element: bytes of a dense number.
        rank: of the adapter.
        ranks: processes.
        shard: whether layers are divided among them.
    """
    one = layer_bytes(shape, storage, element)
    divided = shard and ranks > 1
    tables = (1 if shape.tied else 2) * shape.vocabulary * shape.layer.width * element
    values = adapter_values(shape, rank)
    adapter = 4 * values + trained([values], "adamw_torch", cast=0).bytes
    parts = -(-one // ranks) if divided else one
    return RankBytes(parts * len(shape.layers), WHOLE_LAYERS * one if divided else 0, tables, adapter)


def step_bytes(trained: int, divided: int, ranks: int, sharing: int, passes: int) -> StepBytes:
    """What each of ``ranks`` processes sends in a step, by rings.

    An all-reduce sends all bytes but a process's own share twice (Patarasuk and Yuan, 2009, "Bandwidth optimal
    all-reduce algorithms"), a gather of what is divided once; a layer is gathered for its forward and its backward.

    Args:
        trained: numbers that are trained.
        divided: bytes of all layers that are divided; 0 for none.
        ranks: processes.
        sharing: of these, how many share the layers: those of a machine.
        passes: of the step.
    """
    reduced = 2 * (ranks - 1) * 4 * (trained + TRAVELLING) // ranks
    return StepBytes(reduced, 2 * passes * (sharing - 1) * divided // sharing)


def efficiency(compute_s: float, sent: StepBytes, ranks: int, link: Link, inside: Link) -> float:
    """Speed of ``ranks`` processes over as many times that of one, the same rows a process.

    Gradients travel when everything is computed; weights while layers are, so that only what takes longer than those
    counts. The host's share, and processes that wait for one with more tokens, are left out.

    Args:
        compute_s: seconds of a step without the links.
        sent: what each process sends.
        ranks: processes.
        link: the slowest of the ring through all of them, over which gradients are averaged.
        inside: what connects those that share layers.
    """
    if ranks == 1:
        return 1.0
    reduce_s = sent.reduced / link.bytes_s + 2 * (ranks - 1) * link.delay_s
    return compute_s / (max(compute_s, sent.gathered / inside.bytes_s) + reduce_s)
