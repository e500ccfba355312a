"""``plan.passes``: what a pass may hold is obeyed, grows with memory, and is counted as the layers really keep it."""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jebi.adapters.lora import attach
from jebi.config import Checkpointing, LoraConfig
from jebi.config.limits import CHUNK_TOKENS
from jebi.models.families import DecoderShape
from jebi.models.hf import JebiForCausalLM
from jebi.nn.layer import DecoderLayer
from jebi.nn.layer_node import Keep, run_layer
from jebi.nn.rows import rows_from_lengths
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.plan.activations import (
    AdapterRanks,
    Pass,
    host_bytes_per_token,
    kept_bytes_per_token,
    loss_bytes,
    pass_bytes,
    sent_bytes_per_token,
    work_bytes,
)
from jebi.plan.held import Held
from jebi.plan.inventory import SLACK_BYTES, pass_items, total
from jebi.plan.passes import CPU_PASS_TOKENS, PassPlan, Room, choose, room_beside

LLAMA_8B = DecoderShape((LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5)),) * 32, 128256, tied=False)
MODES: tuple[Checkpointing, ...] = ("none", "keep_attention", "recompute", "offload")
GB = 2**30


def plan(
    free: float, asked: Checkpointing | None = None, longest: int = 2048, limit: int = 32768, host: float = 0.0
) -> PassPlan:
    return choose(LLAMA_8B, 2, Room(int(free * GB), host=int(host * GB)), longest, asked, limit)


@pytest.mark.parametrize("free", [0.1, 2.0, 8.0, 40.0, 1000.0])
@pytest.mark.parametrize("asked", MODES)
def test_what_is_asked_is_obeyed_whatever_the_memory(asked: Checkpointing, free: float) -> None:
    assert plan(free, asked).checkpointing == asked


def test_left_open_it_keeps_everything_while_a_pass_then_still_holds_the_longest_row() -> None:
    work = max(work_bytes(LLAMA_8B, 2, "none", 2048, 8192), loss_bytes(LLAMA_8B, 2, 2048, on_card=True))
    needed = (2048 * kept_bytes_per_token(LLAMA_8B, 2, "none") + work) / (Room(GB).usable / GB) / GB
    assert plan(1.01 * needed, limit=2048).checkpointing == "none"
    assert plan(0.99 * needed, limit=2048).checkpointing != "none"
    assert plan(1000.0) == PassPlan("none", 32768)


def test_a_short_memory_makes_short_passes_and_never_none() -> None:
    assert plan(0.0).tokens == plan(-1.0).tokens == 1
    assert plan(0.0).checkpointing == "recompute"
    assert not plan(0.0).fits
    assert plan(1000.0).fits


@pytest.mark.parametrize("asked", [*MODES, None])
def test_more_memory_is_never_slower(asked: Checkpointing | None) -> None:
    plans = [plan(free / 4, asked) for free in range(1, 400)]
    for smaller, larger in pairwise(plans):
        assert larger.cost <= smaller.cost
        if asked is not None:
            assert smaller.tokens <= larger.tokens <= 32768
            assert larger.kept_layers == 0, "what is asked is obeyed"
    whole = [made.checkpointing == "none" for made in plans]
    assert whole == sorted(whole), "where everything fits more memory changes no more"


def test_layers_keep_what_there_is_room_for() -> None:
    """One after the other, and never the input alone where another layer's everything would fit."""
    kept = [made.kept_layers for made in (plan(free / 8, limit=2048) for free in range(16, 80))]
    assert max(kept) > 20
    recomputing = [made for made in (plan(free / 8, limit=2048) for free in range(16, 80)) if made.fits]
    assert all(made.kept_layers == 0 for made in recomputing if made.checkpointing == "none")
    costs = [made.cost for made in recomputing]
    assert costs == sorted(costs, reverse=True)


def test_weights_dequantised_at_every_use_ask_for_longer_passes() -> None:
    room = Room(5 * GB // 2, weights=13 * GB, scratch=0)
    packed, dense = (choose(LLAMA_8B, 2, one, 512, None, 8192) for one in (room, Room(5 * GB // 2)))
    assert packed.tokens > dense.tokens
    assert not packed.keep_weights
    assert choose(LLAMA_8B, 2, Room(100 * GB, 13 * GB, GB // 4), 512, None, 8192).keep_weights


def test_of_long_rows_attention_is_kept_before_it_is_recomputed() -> None:
    modes = [plan(free, longest=16384).checkpointing for free in range(4, 100, 4)]
    assert modes == sorted(modes, key=["recompute", "keep_attention", "none"].index)
    assert len(set(modes)) == 3


def test_host_memory_is_used_where_it_pays_and_only_as_much_as_there_is() -> None:
    long = 131072
    assert plan(18.0, longest=long, host=100.0).checkpointing == "offload"
    assert plan(60.0, longest=long, host=100.0).checkpointing == "offload", "attention is not recomputed"
    assert plan(4.5, longest=2048, limit=8192, host=100.0).checkpointing == "recompute", "of short rows it is little"
    assert plan(18.0, longest=long).checkpointing == "recompute", "no room on the host"
    assert plan(18.0, longest=long, host=70.0).checkpointing == "recompute", "not enough room on the host"
    needed = 4096 * host_bytes_per_token(LLAMA_8B, 2) / 0.8 / GB
    scarce = plan(0.8, host=1.01 * needed)
    assert scarce.checkpointing == "offload"
    assert scarce.tokens <= 1.01 * 4096


def test_gate_and_up_go_to_host_memory_where_the_bus_is_idle() -> None:
    inputs, each = host_bytes_per_token(LLAMA_8B, 2), sent_bytes_per_token(LLAMA_8B, 2)

    def sent(layers: float, longest: int = 2048, host: float = 100.0, crossing: int = 0) -> PassPlan:
        carried = int(inputs + layers * each)
        room = Room(2 * GB, 13 * GB, GB // 4, int(host * GB), carried=carried, crossing=crossing)
        return choose(LLAMA_8B, 2, room, longest, None, 8192)

    plans = [sent(layers) for layers in (0, 0.9, 3.5, 9.5, 100)]
    assert all(made.checkpointing == "offload" for made in plans)
    assert [made.shipped_layers for made in plans] == [0, 0, 3, 9, 16], "never two layers one behind the other"
    assert [made.cost for made in plans] == sorted((made.cost for made in plans), reverse=True)
    assert sent(9.5, longest=16384).shipped_layers == 0
    assert sent(9.5, crossing=128256 * 4096).shipped_layers == 0, "the head has the bus"
    scarce = sent(9.5, host=3.0)
    assert scarce.tokens * (inputs + scarce.shipped_layers * each) <= 0.8 * 3 * GB


def test_long_rows_need_little_more_than_their_own_tensors() -> None:
    """One row of 131,072 tokens of the 8B shape beside 6.3 GiB of weights in 24 GiB."""
    needed = work_bytes(LLAMA_8B, 2, "offload", 131072, 8192)
    assert needed < 12 * GB
    # Nothing of the feed-forward width is counted for all tokens.
    assert work_bytes(LLAMA_8B, 2, "offload", 131072, 4096) > needed - 1.2 * GB
    assert work_bytes(LLAMA_8B, 2, "none", 131072, 8192) > needed + 3 * GB


def test_a_short_memory_makes_small_chunks_before_it_leaves_the_card() -> None:
    chunks = [plan(free / 20, "recompute", limit=8192, longest=8192).chunk for free in range(10, 140)]
    assert chunks == sorted(chunks)
    # 1,024 is the last resort; between, chunks help as long as they and not attention or the loss take the most.
    assert {1024, 4096, 8192} <= set(chunks) <= {1024, 2048, 4096, 8192}


def test_a_pass_is_never_longer_than_is_worth_it() -> None:
    assert plan(1000.0, limit=CPU_PASS_TOKENS, longest=100) == PassPlan("none", CPU_PASS_TOKENS)


@pytest.mark.parametrize("element", [2, 4])
def test_the_less_is_kept_the_less_is_counted(element: int) -> None:
    kept = [kept_bytes_per_token(LLAMA_8B, element, mode) for mode in MODES]
    assert kept[0] > 10 * kept[2] > kept[3] == 0
    assert kept[2] == 32 * 4096 * element
    # Attention's output is as wide, and each head has a sum.
    assert kept[1] == 2 * kept[2] + 32 * 32 * 4 == host_bytes_per_token(LLAMA_8B, element)


@pytest.fixture
def layer(tiny_llama: Callable[[str], Path], load: Callable[..., Any]) -> Callable[[torch.dtype], JebiForCausalLM]:
    """A model of one layer's shape in a dtype, with the smallest adapter."""

    def make(dtype: torch.dtype) -> JebiForCausalLM:
        model: JebiForCausalLM = load(tiny_llama("tied"), dtype)
        attach(model, LoraConfig(r=1))
        return model

    return make


def counted(model: JebiForCausalLM, lengths: list[int], keep: Keep) -> int:
    """Bytes that one layer's graph holds on to for its backward, each storage once; parameters are not among them."""
    layer, dtype = model.model.layers[0], model.dtype
    assert isinstance(layer, DecoderLayer)
    rows = rows_from_lengths(lengths, torch.device("cpu"))
    hidden = torch.randn(sum(lengths), model.model.shape.layer.width).to(dtype).requires_grad_()
    tables = model.model.rotary["full_attention"].of_rows(rows, dtype)
    noted: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved = tensor.detach()  # a node that saved its own output would hold itself
        noted.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run_layer(layer, hidden, tables, rows, keep)
    node = vars(out.grad_fn)
    held = [*tensors([value for name, value in node.items() if name not in ("layer", "tables", "rows", "trained")])]
    held += [tensor for reference in noted if (tensor := reference()) is not None]
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *tables, rows.positions_U)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(size for address, size in storages.items() if address not in apart)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a record of tensors."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def predicted(model: JebiForCausalLM, mode: Checkpointing) -> int:
    """Bytes of one layer and token."""
    return kept_bytes_per_token(
        dataclasses.replace(model.model.shape, layers=model.model.shape.layers[:1]), model.dtype.itemsize, mode
    )


def test_a_layer_that_keeps_everything_keeps_what_is_counted(layer: Callable[[torch.dtype], JebiForCausalLM]) -> None:
    """The adapters' ``x A^T`` among it, of seven maps."""
    model = layer(torch.float32)
    one = dataclasses.replace(model.model.shape, layers=model.model.shape.layers[:1])
    made = Pass(96, "none", CHUNK_TOKENS)
    assert counted(model, [96], "all") == pass_bytes(one, 4, made, False, AdapterRanks(7, 2)).kept


def test_layers_that_send_gate_and_up_keep_what_adapters_made_for_them() -> None:
    """Of 3 layers in 2 bytes: ranks of 16 of gate and of up in 32 layers."""
    made = Pass(512, "offload", CHUNK_TOKENS, shipped_layers=3)
    ranks = AdapterRanks(7 * 512, 1024), AdapterRanks()
    with_adapters, without = (pass_bytes(LLAMA_8B, 2, made, True, each) for each in ranks)
    assert with_adapters.kept - without.kept == 512 * 3 * 32 * 2


def test_layers_that_keep_everything_keep_what_adapters_make_of_a_token() -> None:
    """Ranks of 64 instead of 8 are a hundredth of the activations of Llama 8B, and cost that of the tokens."""
    held = [Held(LLAMA_8B, "dense", 2, lora=LoraConfig(r=r)) for r in (8, 64)]
    rooms = [room_beside(one, 40 * GB) for one in held]
    ranks = [AdapterRanks(32 * 7 * r, 32 * 2 * r) for r in (8, 64)]
    assert [room.ranks for room in rooms] == ranks
    for mode, layers in (("none", 32), ("recompute", 4), ("recompute", 0)):
        made = Pass(1000, mode, CHUNK_TOKENS, kept_layers=0 if mode == "none" else layers)
        few, many = (total(pass_items(one, made), part="activations") for one in held)
        assert many - few == 1000 * 2 * (ranks[1].every - ranks[0].every) * layers // 32
    few, many = (choose(LLAMA_8B, 2, room, 512, "none", 10**6).tokens for room in rooms)
    assert 0.985 < many / few < 0.995


def test_a_room_on_a_card_is_less_what_the_allocator_keeps() -> None:
    held = Held(LLAMA_8B, "dense", 2, lora=LoraConfig())
    assert room_beside(held, 40 * GB).card == 40 * GB - SLACK_BYTES
    assert room_beside(dataclasses.replace(held, on_card=False), 40 * GB).card == 40 * GB


def test_on_a_cpu_16_bit_attention_keeps_float32_copies_which_are_not_counted(
    layer: Callable[[torch.dtype], JebiForCausalLM],
) -> None:
    """Passes on a CPU are short, so memory does not choose their length there (`CPU_PASS_TOKENS`)."""
    model = layer(torch.bfloat16)
    shape = model.model.shape.layer
    copies = 4 * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
    assert 0 <= counted(model, [96], "all") - 96 * predicted(model, "none") <= 96 * (copies + 7 * 2)


def test_a_layer_that_keeps_attention_keeps_its_input_and_that(layer: Callable[[torch.dtype], JebiForCausalLM]) -> None:
    model = layer(torch.float32)
    assert counted(model, [96], "input_and_attention") == 96 * predicted(model, "keep_attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_recomputes_keeps_its_input(
    dtype: torch.dtype, layer: Callable[[torch.dtype], JebiForCausalLM]
) -> None:
    model = layer(dtype)
    assert counted(model, [96], "input") == 96 * predicted(model, "recompute") == 96 * 64 * dtype.itemsize


def test_whole_rows_fill_a_pass_where_all_are_alike() -> None:
    def cost(alike: bool, on_card: bool = True) -> float:
        room = Room(18 * GB, on_card=on_card)
        found = choose(LLAMA_8B, 2, room, 2048, "none", 8192, alike)
        assert 2 * 2048 < found.tokens < 3 * 2048 or not on_card
        return found.cost

    assert cost(True) == 40 / 4096
    assert cost(False) < cost(True)
    assert cost(True, on_card=False) == cost(False, on_card=False)


def test_a_pass_takes_its_time_whatever_the_model() -> None:
    """A half of the layers takes half the time, of which a pass' overhead is twice as large a part."""
    half = dataclasses.replace(LLAMA_8B, layers=LLAMA_8B.layers[:16])
    whole, light = (choose(shape, 2, Room(100 * GB), 512, "recompute", 8192) for shape in (LLAMA_8B, half))
    assert whole.cost - 40 / 8192 == pytest.approx(2 * (light.cost - 40 / 8192))


def test_a_head_that_crosses_the_bus_costs_a_pass_the_same_whatever_its_size() -> None:
    """400 tokens' time for Llama 8B's, so that of rows alike as many fill a pass as may."""
    values = LLAMA_8B.vocabulary * LLAMA_8B.layer.width
    for tokens in (1024, 4096):
        bare, crossing = (
            choose(LLAMA_8B, 2, Room(100 * GB, crossing=crossing), 512, "none", tokens).cost for crossing in (0, values)
        )
        assert crossing - bare == pytest.approx(400 / tokens, rel=1e-3)
