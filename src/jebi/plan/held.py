"""A model and its adapter as settings say they are held, by one of the processes that train it.

Everything about a run that does not follow from the rows. What it all takes is `plan.inventory`'s. No torch here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jebi.adapters.targets import resolve_paths
from jebi.config import LoraConfig, Places, Storage
from jebi.config.launched import ALONE, World
from jebi.config.limits import WHOLE_LAYERS
from jebi.models.families import DecoderShape
from jebi.nn.shape import LayerShape, MapShape
from jebi.plan.activations import AdapterRanks
from jebi.quant.footprint import divided_bytes, weight_bytes

_WIDE = ("gate_proj", "up_proj", "gate_up_proj")
"""The maps whose outputs may be sent to host memory."""


@dataclass(frozen=True)
class Held:
    """A model and its adapter as settings say they are held."""

    shape: DecoderShape
    """The decoder."""
    storage: Storage
    """How the projections are held."""
    element: int
    """Bytes of a number in the compute dtype."""
    places: Places = Places("card", "card")  # noqa: RUF009  (frozen)
    """Where embedding and head are, nothing left open."""
    lora: LoraConfig | None = None
    """The adapter; None where there is none, or where all weights are trained."""
    optimizer: str = "adamw_8bit"
    """`TrainingArguments.optim`."""
    fp8: bool = False
    """Whether the frozen base is multiplied in 8-bit floats."""
    on_card: bool = True
    """Whether a card computes."""
    dense_values: int = 0
    """Values of projections that a packed checkpoint leaves dense."""
    world: World = ALONE
    """The processes, of which one is counted."""
    exact_forward: bool = False
    """Whether ``fp8`` is of the backward alone."""

    @property
    def packed(self) -> bool:
        """Whether projections are dequantised to be multiplied."""
        return self.storage in ("nf4", "int8")

    @property
    def divisible(self) -> bool:
        """Whether several processes may divide its layers."""
        lora = self.lora or LoraConfig()
        plain = not lora.use_dora and lora.init_lora_weights in (True, "gaussian")
        return self.storage != "masters" and not self.fp8 and plain

    def maps(self) -> Iterator[tuple[str, MapShape]]:
        """Every projection of every layer, by its path."""
        for number, layer in enumerate(self.shape.layers):
            for path, one in layer.maps():
                yield f"model.layers.{number}.{path}", one

    @property
    def projected(self) -> int:
        """Values of all projections."""
        return self.shape.projected

    @property
    def packed_values(self) -> int:
        """Those of them that are held packed."""
        return self.projected - self.dense_values if self.packed else 0

    @cached_property
    def parts(self) -> int:
        """Bytes of this process's part of the projections: of all of them where they are not divided."""
        sizes = (one.outputs * one.inputs for _, one in self.maps())
        parts = sum(weight_bytes(self.storage, values, self.element, self.world.shares) for values in sizes)
        dense, packed = (weight_bytes(form, self.dense_values, self.element) for form in ("dense", self.storage))
        return parts + ((dense - packed) // self.world.shares if self.dense_values else 0)

    @cached_property
    def divided(self) -> int:
        """Bytes that are divided, of all processes; 0 where none are."""
        sizes = (one.outputs * one.inputs for _, one in self.maps())
        return sum(divided_bytes(self.storage, values, self.element) for values in sizes if self.world.shares > 1)

    @property
    def gathered(self) -> int:
        """Bytes of divided layers that are there whole, while they are computed."""
        return WHOLE_LAYERS * self.divided // len(self.shape.layers)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of every adapted projection, by its path."""
        if self.lora is None or self.storage == "masters":
            return {}
        config, chosen = resolve_paths(dict(self.maps()), self.lora, len(self.shape.layers))
        return {path: config.rank_of(path) for path in chosen}

    @property
    def halves(self) -> int:
        """Adapters that every adapted projection is multiplied by: PiSSA's has a frozen one beside that trained."""
        return 2 if self.lora is not None and self.lora.pissa else 1

    @cached_property
    def frozen_values(self) -> int:
        """Of the adapters' frozen halves."""
        maps = dict(self.maps())
        return (self.halves - 1) * sum(r * (maps[path].inputs + maps[path].outputs) for path, r in self.ranks.items())

    @property
    def trained_tables(self) -> set[str]:
        """Which of embedding and head are trained; where they are one table, both or none."""
        both = {"embed_tokens", "lm_head"}
        saved = both.intersection((self.lora and self.lora.modules_to_save) or ())
        return both if self.storage == "masters" or (self.shape.tied and saved) else saved

    @cached_property
    def at_work(self) -> AdapterRanks:
        """Of all adapters of all layers, frozen halves included."""
        wide = sum(rank for path, rank in self.ranks.items() if path.endswith(_WIDE))
        return AdapterRanks(self.halves * sum(self.ranks.values()), self.halves * wide)

    @cached_property
    def cast_bytes(self) -> int:
        """The adapters as a card multiplies by them: of the maps of one input below each other (`nn.group`).

        B has the columns of all of them, zeros where they are another map's.
        """
        lora = self.lora or LoraConfig()
        # What is dropped out, and DoRA, run map by map (`group.stacks`).
        if not self.on_card or not self.ranks or lora.use_dora or lora.lora_dropout > 0:
            return 0
        values = 0
        for number, layer in enumerate(self.shape.layers):
            for group in layer.groups():
                rank = sum(self.ranks.get(f"model.layers.{number}.{path}", 0) for path, _ in group)
                values += self.halves * rank * (group[0][1].inputs + sum(one.outputs for _, one in group))
        return self.element * values

    @cached_property
    def matrices(self) -> list[int]:
        """Values of every trained matrix, in the adapter or, where all is trained, in the model."""
        if self.storage == "masters":
            width = self.shape.layer.width
            norms = [width] * (len(self.shape.layers) * norms_of(self.shape.layer) + 1)
            tables = [self.shape.vocabulary * width] * (1 if self.shape.tied else 2)
            return [one.outputs * one.inputs for _, one in self.maps()] + norms + tables
        if self.lora is None:
            return []
        maps, sizes = dict(self.maps()), []
        for path, rank in self.ranks.items():
            one = maps[path]
            sizes += [rank * one.inputs, one.outputs * rank, *([one.outputs] if self.lora.use_dora else [])]
        saved = {"embed_tokens", "lm_head"}.intersection(self.lora.modules_to_save or ())
        return sizes + [self.shape.vocabulary * self.shape.layer.width] * len(saved)


def norms_of(layer: LayerShape) -> int:
    """Norm weights of a layer, as wide as the stream each; those of heads are too small to be counted."""
    return 4 if layer.sandwich else 2
