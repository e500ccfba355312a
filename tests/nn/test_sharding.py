"""``nn.sharding`` in a group of one process; what several make of it is `tests/training/test_ranks.py`'s."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jebi.kernels.dequantize import PackedWeight
from jebi.nn.linear import Linear
from jebi.nn.sharding import Shard
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

NAMES = "packed", "absmax", "codes"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def codes_of(weight: PackedWeight) -> dict[str, Tensor]:
    return {
        name: part
        for name in NAMES
        if isinstance(part := getattr(weight, name, None), Tensor) and not part.is_floating_point()
    }


def layer_of(weights: list[nn.Parameter | PackedWeight]) -> nn.Module:
    """A layer of maps with these weights."""
    layer = nn.Module()
    for number, weight in enumerate(weights):
        linear = Linear(weight.shape[1], weight.shape[0], False, torch.float32)
        linear.store(weight)
        layer.add_module(f"map{number}", linear)
    return layer


@pytest.fixture
def weights() -> list[nn.Parameter | PackedWeight]:
    """Maps whose codes end at odd bytes, and one whose codes hold every half of a float32 there is, NaNs included."""
    cpu = torch.device("cpu")
    odd = [NF4Weight.quantize(torch.randn(3, 5)), Int8Weight.quantize(torch.randn(7, 3))]
    all_halves = NF4Weight.blank((512, 512), torch.float32, cpu)
    all_halves.packed = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    all_halves.absmax.fill_(255)
    return [*odd, all_halves, nn.Parameter(torch.randn(4, 6), requires_grad=False)]


def test_codes_come_back_to_the_bit_and_are_no_integers_for_fsdp2(
    mesh: DeviceMesh, weights: list[nn.Parameter | PackedWeight]
) -> None:
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    before = [{name: part.clone() for name, part in codes_of(weight).items()} for weight in packed]
    dense = [weight.dense(torch.float32) for weight in packed]
    layer = layer_of(weights)
    shard = Shard(layer, mesh)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}, "torch 2.11's FSDP2 takes nothing else"
    assert not codes_of(packed[0]).keys() & {name for name, _ in packed[0].named_buffers()}, "moves and files miss them"
    layer.to(torch.bfloat16)  # rounds dense weights alone
    for _ in range(2):
        shard.gather()
        shard.wait()
        for weight, parts, values in zip(packed, before, dense, strict=True):
            now = codes_of(weight)
            assert now.keys() == parts.keys()
            for name, part in parts.items():
                assert now[name].dtype == part.dtype
                assert torch.equal(now[name], part)
                assert now[name].data_ptr() % 16 == 0
            assert torch.equal(weight.dense(torch.float32), values)
        shard.part()
        kept = sum(part.untyped_storage().nbytes() for weight in packed for part in codes_of(weight).values())
        assert kept == 0, "what was gathered is given back"
