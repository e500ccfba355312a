"""``plan.inventory``: what is counted is what models, adapters and optimizers really hold, and what cards measured."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jebi.adapters.lora import attach
from jebi.config import Checkpointing, LoraConfig, Places, Storage
from jebi.models.families import DecoderShape
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import load_model
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan.activations import AdapterRanks, Pass
from jebi.plan.held import Held
from jebi.plan.inventory import (
    Item,
    Trained,
    adapter_items,
    by_part,
    everything,
    fixed_items,
    kept_weight_bytes,
    model_items,
    scratch_bytes,
    total,
    trained,
)
from jebi.training.optimizer import AdamW8bit

LAYER = LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5))
LLAMA_8B = DecoderShape((LAYER,) * 32, 128256, tied=False)
HELD = Held(LLAMA_8B, "nf4", 2, lora=LoraConfig())


def storages(tensors: list[torch.Tensor]) -> int:
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values())


@pytest.mark.parametrize("storage", ["nf4", "int8", "dense", "masters"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_model_is_as_large_as_it_is_counted(kind: str, storage: Storage, tiny_llama: Callable[[str], Path]) -> None:
    files = find(str(tiny_llama(kind)))
    model = load_model(files, files.config(), torch.bfloat16, torch.device("cpu"), storage)
    found = [*model.parameters(), *model.buffers()]
    rotary = storages([buffer for name, buffer in model.named_buffers() if "rotary" in name])
    counted = total(model_items(Held(model.model.shape, storage, 2)))
    assert counted == storages(found) - rotary


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        LoraConfig(r=4, target_modules="all-linear", rank_pattern={"o_proj": 16}),
        LoraConfig(r=4, use_dora=True),
    ],
    ids=["all", "some", "pattern", "dora"],
)
def test_the_adapter_and_its_moments_are_as_large_as_they_are_counted(
    lora: LoraConfig, tiny_llama: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model: JebiForCausalLM = load(tiny_llama("tied"), torch.float32)
    attach(model, lora)
    matrices = [p for p in model.parameters() if p.requires_grad]
    held = Held(model.model.shape, "dense", 4, lora=lora, on_card=False)
    assert sorted(held.matrices) == sorted(p.numel() for p in matrices)
    optimizer = AdamW8bit(matrices)
    for matrix in matrices:
        matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    moments = storages([value for s in optimizer.state.values() for value in s.values() if torch.is_tensor(value)])
    assert trained(held.matrices, "adamw_8bit").moments == moments
    assert total(adapter_items(held)) >= sum(4 * p.numel() for p in matrices) * 2 + moments


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
        LoraConfig(r=4, target_modules="all-linear", rank_pattern={"o_proj": 8}),
        LoraConfig(r=4, init_lora_weights="pissa"),
        LoraConfig(r=4, init_lora_weights="pissa_niter_2", modules_to_save=["embed_tokens"]),
        LoraConfig(r=4, lora_dropout=0.1),
        LoraConfig(r=4, init_lora_weights="pissa", use_dora=True),
    ],
    ids=["all", "some", "pattern", "pissa", "niter", "dropout", "dora"],
)
def test_casts_and_frozen_halves_are_as_large_as_they_are_counted(
    lora: LoraConfig, tiny_llama: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model: JebiForCausalLM = load(tiny_llama("tied"), torch.float32)
    attach(model, lora)
    model.model.stack(keep=False)
    model.model.cast_adapters(again=False)
    groups = [group for layer in model.model.decoder_layers() if layer.stacked for group in layer.stacked.stacked()]
    casts = [cast for group in groups for cast in group.casts() or ()]
    held = Held(model.model.shape, "dense", 4, lora=lora)
    assert bool(casts) == bool(groups) == (not lora.use_dora and not lora.lora_dropout)
    assert held.cast_bytes == sum(cast.nbytes for cast in casts)
    matrices = [p for p in model.parameters() if p.requires_grad]
    matrices += [buffer for name, buffer in model.named_buffers() if "frozen" in name]
    of_adapter = next(item for item in adapter_items(held) if item.name == "adapter (float32)")
    assert of_adapter.bytes == sum(matrix.nbytes for matrix in matrices)


def test_ranks_at_work_are_those_of_every_half_and_of_a_fused_pair_too() -> None:
    fused = dataclasses.replace(HELD.shape, layers=tuple(dataclasses.replace(x, fused=True) for x in HELD.shape.layers))
    plain = dataclasses.replace(HELD, lora=LoraConfig(r=8, target_modules="all-linear"))
    assert plain.at_work == AdapterRanks(32 * 7 * 8, 32 * 2 * 8)
    assert dataclasses.replace(plain, shape=fused).at_work == AdapterRanks(32 * 4 * 8, 32 * 8)
    halves = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa_niter_4")
    assert dataclasses.replace(plain, lora=halves).at_work == AdapterRanks(2 * 32 * 7 * 8, 2 * 32 * 2 * 8)


def test_moments_by_the_optimizers_name() -> None:
    """1,000 values are 1,024 with padding; so few have float32 moments in 8-bit AdamW too."""
    assert trained([1000], "adamw_torch") == trained([1000], "adamw_8bit") == Trained(4096, 8192)
    assert trained([2**20], "adamw_8bit").moments == 2 * 2**20 + 2**20 // 32


def test_the_whole_is_its_parts() -> None:
    items = everything(HELD, Pass(4096, "offload", 8192), checkpoints=3)
    assert sum(size for _, size in by_part(items)) == total(items)
    for where in ("card", "host", "disk"):
        assert total(items, where) == sum(item.bytes for item in items if item.where == where) > 0
    assert all(item.bytes >= 0 for item in items)


MODES: tuple[Checkpointing, ...] = ("none", "keep_attention", "recompute", "offload")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on_card", [True, False])
def test_more_tokens_never_take_less(mode: Checkpointing, on_card: bool) -> None:
    held = dataclasses.replace(HELD, on_card=on_card)
    sizes = [total(everything(held, Pass(tokens, mode, 8192))) for tokens in range(256, 20000, 977)]
    assert sizes == sorted(sizes)


def test_layers_that_keep_everything_take_more_one_by_one() -> None:
    sizes = [total(everything(HELD, Pass(4096, "recompute", 8192, kept_layers=kept))) for kept in range(32)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < total(everything(HELD, Pass(4096, "none", 8192)))


def test_gate_and_up_that_are_sent_take_room_on_the_host_and_one_layers_on_their_way() -> None:
    on_card, on_host = (
        [total(everything(HELD, Pass(4096, "offload", 8192, shipped_layers=sent)), where) for sent in (0, 1, 9)]
        for where in ("card", "host")
    )
    each, of_adapters = 2 * 14336 * 2 * 4096, 2 * 16 * 2 * 4096
    assert [size - on_card[0] for size in on_card] == [0, each + of_adapters, each + 9 * of_adapters]
    assert [size - on_host[0] for size in on_host] == [0, each, 9 * each]


def test_places_move_bytes_off_the_card() -> None:
    table = 128256 * 4096 * 2
    on_card, off = (
        model_items(dataclasses.replace(HELD, places=places)) for places in (HELD.places, Places("host", "host"))
    )
    assert total(on_card) - total(off) == total(off, "host") == 2 * table
    int8 = model_items(dataclasses.replace(HELD, places=Places("card", "int8")))
    assert total(int8) == total(on_card) - table + table // 2 + table // 2 // 16


def test_packed_weights_are_dequantised_once_or_at_every_use() -> None:
    dense = dataclasses.replace(HELD, storage="dense")
    assert kept_weight_bytes(dense) == 0
    assert kept_weight_bytes(HELD) == 2 * sum(p.outputs * p.inputs for _, p in HELD.maps()) == 2 * HELD.projected
    eight = dataclasses.replace(HELD, fp8=True)
    behind = dataclasses.replace(eight, exact_forward=True)
    assert [kept_weight_bytes(held) for held in (eight, behind)] == [2 * HELD.projected, 3 * HELD.projected]
    assert scratch_bytes(eight) == scratch_bytes(behind) // 2 == scratch_bytes(HELD) // 2
    in_8_bits = [total(fixed_items(dataclasses.replace(held, storage="dense"))) for held in (eight, behind)]
    assert in_8_bits == [2 * HELD.projected, HELD.projected]
    names = [item.name for item in everything(dense, Pass(2048, "none", 8192))]
    assert not any("dequantised" in name or "multiplied" in name for name in names)


def test_items_are_named() -> None:
    items = everything(HELD, Pass(2048, "recompute", 8192))
    names = [item.name for item in items]
    assert len(names) == len(set(names))
    assert Item("head", "model", 128256 * 4096 * 2) in items
