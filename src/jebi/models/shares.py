"""Loading a model whose layers several processes share: each reads some of the weights, and passes them on.

Of a layer's maps the first process reads and quantises the first, the second the second, and so on; when all have
arrived they are sent around, packed as they are, and every process keeps its part (`nn.sharding`). So a checkpoint is
read once by all of them together, and no process ever holds more than its parts and a layer or two.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jebi.config import launched
from jebi.config.launched import World
from jebi.errors import ConfigError
from jebi.kernels.dequantize import PackedWeight
from jebi.nn.host_weight import HostWeight
from jebi.nn.sharding import Shard, link
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

if TYPE_CHECKING:
    from jebi.models.shell import JebiPreTrainedModel


def join(device: torch.device) -> DeviceMesh | None:
    """Meet the other processes that a launcher has started, as Trainer would later; those of this machine.

    None where a process has its machine, or all machines, to itself.

    Raises:
        ConfigError: machines have different numbers of processes.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    # Trainer meets them no more, so that processes wait for each other as long as they would there by themselves (its
    # ddp_timeout): the first one may read the rows through meanwhile.
    count = int(PartialState(cpu=device.type == "cpu", timeout=timedelta(minutes=30)).num_processes)
    shares = World(count, launched.here(count), shard=True).shares
    if len(numbers := set(gather_object([shares]))) > 1:
        raise ConfigError(
            f"shard=True divides the layers among the processes of a machine, and machines of this job have {numbers} "
            "of them: start as many on each (--nproc-per-node), or leave shard away."
        )
    if shares == 1:
        return None
    sizes = (count // shares, shares)
    return init_device_mesh(device.type, sizes, mesh_dim_names=("machines", "cards"))["cards"]


class Shares:
    """What this process reads of a model that is being loaded, and which of its layers are whole already."""

    def __init__(self, model: "JebiPreTrainedModel", mesh: DeviceMesh, divided: bool):
        """Nothing has arrived yet.

        Args:
            model: on the meta device.
            mesh: the processes that share it.
            divided: whether the processes share the reading too. Where the checkpoint says how each weight is held,
                all of them read everything.
        """
        self._mesh = mesh
        self._layers = list(model.model.decoder_layers())
        self._missing = [len(list(layer.parameters())) for layer in self._layers]
        self._readers: dict[str, int] = {}
        """By the names of weights that one process reads, which one."""
        if divided:
            for index, layer in enumerate(self._layers):
                for number, (name, _) in enumerate(layer.projections()):
                    self._readers[f"model.layers.{index}.{name}.weight"] = number % mesh.size()
        self._shards: list[Shard | None] = [None] * len(self._layers)

    def reads(self, name: str) -> bool:
        """Whether this process reads the tensor of that name."""
        own = self._mesh.get_local_rank()
        return self._readers.get(name, own) == own

    def arrived(self, name: str) -> None:
        """A tensor is in its place, or room for it; with a layer's last one, the layer is divided."""
        if not name.startswith("model.layers."):
            return
        index = int(name.split(".")[2])
        self._missing[index] -= 1
        if self._missing[index]:
            return
        layer = self._layers[index]
        for path, linear in layer.projections():
            reader = self._readers.get(f"model.layers.{index}.{path}.weight")
            if reader is not None:
                assert not isinstance(linear.weight, HostWeight), "only a head is there"
                for tensor in _tensors(linear.weight):
                    dist.broadcast(tensor, group=self._mesh.get_group(), group_src=reader)
        layer.shard = self._shards[index] = Shard(layer, self._mesh)

    def finish(self) -> None:
        """All layers are there."""
        link([shard for shard in self._shards if shard is not None])


def room_for(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, form: str
) -> nn.Parameter | PackedWeight:
    """A weight (N, K) that another process reads, with nothing in it yet."""
    if form == "nf4":
        return NF4Weight.blank((shape[0], shape[1]), dtype, device)
    if form == "int8":
        return Int8Weight.blank((shape[0], shape[1]), dtype, device)
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _tensors(weight: nn.Parameter | PackedWeight) -> list[torch.Tensor]:
    return [weight.data] if isinstance(weight, nn.Parameter) else list(weight.buffers())
