"""``nn.layer_node`` against the plain layer, and both against float64: output and every gradient by name."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jebi.kernels.rope import rope_tables
from jebi.nn.attention import attend_rows
from jebi.nn.base_product import DenseProduct, Scratch
from jebi.nn.host_memory import HostMemory
from jebi.nn.layer import DecoderLayer, LayerShape, Norm
from jebi.nn.layer_node import Keep, Keeping, run_layer, serves
from jebi.nn.lora import Lora
from jebi.nn.rows import Rows, rows_from_lengths
from jebi.nn.shape import AttentionForm
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("poisoned_empty")

WIDTH, HEAD, FFN, LENGTHS = 48, 10, 77, [5, 1, 11]
CPU = torch.device("cpu")
ROWS = rows_from_lengths(LENGTHS, CPU)
# The same three rows when the second and third begin with one and four tokens of the first.
SHARED = Rows(
    starts=ROWS.starts,
    positions_U=torch.tensor([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]),
    whole_T=torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]),
    first_U=torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16]),
)
INV_FREQ = 1.0 / (100.0 ** (torch.arange(0, HEAD, 2).float() / HEAD))
KEEPS: tuple[Keep, ...] = ("all", "input_and_attention", "input", "input_on_host")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setup:
    """What varies between layers."""

    targets: tuple[str, ...] = ALL
    biases: bool = False
    trained_biases: bool = False
    enabled: bool = True
    packed: type[NF4Weight | Int8Weight] | None = None
    trained_norms: bool = False
    shape: dict[str, Any] = field(default_factory=dict)
    """Flags of `LayerShape` that are not Llama's."""


SETUPS = {
    "all": Setup(),
    "frozen biases": Setup(biases=True),
    "trained biases": Setup(biases=True, trained_biases=True),
    "attention only": Setup(("q_proj", "k_proj", "v_proj", "o_proj")),
    "q and down": Setup(("q_proj", "down_proj")),
    "down alone": Setup(("down_proj",)),
    "v beside trained biases": Setup(("v_proj",), biases=True, trained_biases=True),
    "disabled": Setup(enabled=False),
    "disabled beside trained biases": Setup(biases=True, trained_biases=True, enabled=False),
    "nothing trained": Setup(()),
    "4 bits": Setup(packed=NF4Weight),
    "8 bits": Setup(packed=Int8Weight),
    "trained norms": Setup(trained_norms=True),
    "normed queries and keys": Setup(shape={"qk_norm": True}),
    "trained norms of queries and keys": Setup(trained_norms=True, shape={"qk_norm": True}),
    "gelu": Setup(shape={"activation": "gelu_tanh"}),
    "weights less one": Setup(trained_norms=True, shape={"unit_offset": True}),
    "normed blocks": Setup(shape={"sandwich": True}),
    "trained norms of blocks": Setup(trained_norms=True, shape={"sandwich": True, "unit_offset": True}),
    "fused": Setup(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), shape={"fused": True}),
    "fused with biases": Setup(("qkv_proj",), biases=True, trained_biases=True, shape={"fused": True}),
    "window": Setup(shape={"attention": AttentionForm(0.3, window=3)}),
    "cap": Setup(shape={"attention": AttentionForm(0.3, softcap=1.5)}),
    "everything": Setup(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        trained_norms=True,
        shape={
            "attention": AttentionForm(0.3, window=4, softcap=1.5),
            "activation": "gelu_tanh",
            **dict.fromkeys(("qk_norm", "unit_offset", "sandwich", "fused"), True),
        },
    ),
}


def build(setup: Setup, dtype: torch.dtype) -> DecoderLayer:
    """A layer of random weights whose activations stay of order 1; equal numbers for equal setups and dtypes."""
    flags = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), setup.biases)
    flags |= {"attention": AttentionForm(HEAD**-0.5)} | setup.shape
    layer = DecoderLayer(LayerShape(WIDTH, 4, 2, HEAD, FFN, 1e-5, **flags), dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        middle = 0 if name.endswith("bias") or layer.shape.unit_offset else 1
        scaled = drawn * drawn.shape[1] ** -0.5 if drawn.dim() == 2 else 0.1 * drawn + middle
        path, _, leaf = name.rpartition(".")
        trained = setup.trained_norms and path.endswith("norm")
        setattr(layer.get_submodule(path), leaf, nn.Parameter(scaled.to(dtype), requires_grad=trained))
    for path, linear in layer.projections():
        if path.rpartition(".")[2] in setup.targets:
            linear.lora = Lora(linear.in_features, linear.out_features, 3, 0.7, 0.0, CPU)
            linear.lora.reset(generator)
            nn.init.normal_(linear.lora.B_Nr, std=0.5, generator=generator)
            linear.lora.enabled = setup.enabled
        if setup.trained_biases:
            linear.bias = nn.Parameter(linear.bias.detach().float())
        if setup.packed:
            linear.store(setup.packed.quantize(linear.weight))
    return layer


def inputs(dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Hidden states and the output's gradient."""
    hidden, dout = torch.randn(2, sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return hidden, dout


def exact(layer: DecoderLayer, hidden: Tensor, trained_input: bool, dout: Tensor) -> dict[str, Tensor | None]:
    """The layer written out in float64, from the layer's own (rounded) weights."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}

    shape = layer.shape

    def norm(name: str, x: Tensor) -> Tensor:
        weight = leaves[f"{name}.weight"] + (1 if shape.unit_offset else 0)
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def linear(path: str, x: Tensor) -> Tensor:
        module = layer.get_submodule(path)
        y = x @ module.dense().double().t()
        if module.bias is not None:
            y = y + leaves[f"{path}.bias"]
        if module.adapter is not None:
            y = y + 0.7 * x @ leaves[f"{path}.lora.A_rK"].t() @ leaves[f"{path}.lora.B_Nr"].t()
        return y

    def turn(x: Tensor) -> Tensor:
        angles = ROWS.positions_U[:, None].double() * INV_FREQ.double()
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    hidden = hidden.double().requires_grad_(trained_input)
    x = norm("input_layernorm", hidden)
    if shape.fused:
        q, k, v = linear("self_attn.qkv_proj", x).split(shape.qkv_sizes, dim=-1)
    else:
        q, k, v = (linear(f"self_attn.{name}_proj", x) for name in "qkv")
    q, k, v = (y.unflatten(-1, (-1, HEAD)) for y in (q, k, v))
    if shape.qk_norm:
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    q, k = turn(q), turn(k)
    rows = []
    for start, end in pairwise(ROWS.starts):
        queries, keys, values = (y[start:end].transpose(0, 1) for y in (q, k, v))
        keys, values = (y.repeat_interleave(2, dim=0) for y in (keys, values))
        scores = queries @ keys.transpose(1, 2) * shape.attention.scale
        if shape.attention.softcap:
            scores = shape.attention.softcap * (scores / shape.attention.softcap).tanh()
        ones = torch.ones(scores.shape[-2:])
        hidden_from = ones.triu(1).bool()
        if shape.attention.window:
            hidden_from |= ones.tril(-shape.attention.window).bool()
        rows.append((scores.masked_fill(hidden_from, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    mixed = linear("self_attn.o_proj", torch.cat(rows).flatten(-2))
    middle = hidden + (norm("post_attention_layernorm", mixed) if shape.sandwich else mixed)
    x = norm("pre_feedforward_layernorm" if shape.sandwich else "post_attention_layernorm", middle)
    if shape.fused:
        gate, up = linear("mlp.gate_up_proj", x).chunk(2, dim=-1)
    else:
        gate, up = linear("mlp.gate_proj", x), linear("mlp.up_proj", x)
    act = F.gelu(gate, approximate="tanh") if shape.activation == "gelu_tanh" else gate * gate.sigmoid()
    down = linear("mlp.down_proj", act * up)
    out = middle + (norm("post_feedforward_layernorm", down) if shape.sandwich else down)
    if out.requires_grad:
        out.backward(dout.double())
    return {"out": out.detach(), "hidden": hidden.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def run(
    layer: DecoderLayer,
    hidden: Tensor,
    trained_input: bool,
    dout: Tensor,
    keep: Keep | Keeping | None,
    rows: Rows = ROWS,
) -> dict[str, Tensor | None]:
    """The plain layer (``keep`` None) or the node: its output and every gradient, where the stream itself stands."""
    hidden = (hidden * layer.scale).requires_grad_(trained_input)
    tables = rope_tables(rows.positions_U, INV_FREQ, 1.0, hidden.dtype)
    if keep is None:
        out = layer(hidden, tables, lambda q, k, v: attend_rows(q, k, v, rows, layer.shape.attention))
    else:
        out = run_layer(layer, hidden, tables, rows, keep)
    if out.requires_grad:
        out.backward(dout / layer.scale)
    dhidden = None if hidden.grad is None else hidden.grad * layer.scale
    out = out.detach() if layer.scale == 1 else out.detach().float() / layer.scale
    return {"out": out, "hidden": dhidden} | {name: p.grad for name, p in layer.named_parameters()}


def unscaled(layer: DecoderLayer) -> DecoderLayer:
    """The layer with its residual stream as it is, in float16 too."""
    layer.scale = 1.0
    for module in layer.modules():
        if isinstance(module, Norm):
            module.eps = 1e-5
    return layer


@pytest.mark.parametrize("trained_input", [True, False], ids=["inner layer", "first layer"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients(at_most_twice, dtype: torch.dtype, setup: Setup, trained_input: bool) -> None:
    def results(keep: str) -> dict[str, Tensor | None]:
        """Over three draws: of one alone a small gradient's error may by chance be twice another's."""
        draws = []
        for seed in (1, 2, 3):
            values = inputs(dtype, seed)
            if keep == "exact":
                draws.append(exact(build(setup, dtype), values[0], trained_input, values[1]))
                continue
            layer = build(setup, dtype) if keep != "plain" else unscaled(build(setup, dtype))
            if keep.startswith("stacked"):
                scratch = Scratch() if "dequantised" in keep else None
                layer.stack(lambda maps, scratch=scratch: DenseProduct(maps, scratch))
                assert layer.stacked is not None
            form = {"plain": None}.get(keep, "all" if keep.startswith("stacked") else keep)
            draws.append(run(layer, values[0], trained_input, values[1], form))
        names = draws[0]
        return {n: None if names[n] is None else torch.stack([draw[n] for draw in draws]) for n in names}

    plain, fine = results("plain"), results("exact")
    for keep in ("all", "input", "input_on_host", "stacked", "stacked, dequantised at every use"):
        ours = results(keep)
        assert ours.keys() == plain.keys()
        for name, value in ours.items():
            assert (value is None) == (plain[name] is None) == (fine[name] is None), name
            if value is not None:
                at_most_twice(f"{name} (keep {keep})", value.to(plain[name].dtype), plain[name], fine[name])


# The second number is what a loss scale would have found, since gradients grow with the massive product; the third is a
# dozen roundings (2**-11 each) on the way, grown by 4. The gradient through a norm of massive outputs is what is left
# of two large numbers, which takes another digit.
@pytest.mark.parametrize(
    ("setup", "unscale", "bar"), [("all", 4096, 0.02), ("fused", 4096, 0.02), ("normed blocks", 16, 0.1)]
)
def test_float16_bears_activations_beyond_its_range(setup: str, unscale: float, bar: float) -> None:
    """``act * up`` and the stream beyond 65,504: the node and the plain layer are near float64, by every name."""
    hidden, dout = inputs(torch.float16)
    dout /= unscale

    def massive(setup: Setup) -> DecoderLayer:
        """A layer with one channel in 77 whose gated product is massive."""
        layer = build(setup, torch.float16)
        with torch.no_grad():
            for linear in layer.gate_up():
                linear.weight[3::FFN] *= 500
            layer.mlp.down_proj.weight[:, 3] *= 4
        return layer

    chosen = SETUPS[setup]
    fine = exact(massive(chosen), hidden, True, dout)
    assert setup == "normed blocks" or fine["out"].abs().max() > 4 * 65_504
    assert not run(unscaled(massive(chosen)), hidden, True, dout, None)["out"].isfinite().all()
    for keep in (None, "all", "input"):
        for name, value in run(massive(chosen), hidden, True, dout, keep).items():
            if value is not None:
                error = (value.double() - fine[name]).norm() / fine[name].norm()
                assert error < bar, f"{name} (keep {keep}): {error:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_common_beginnings_held_once(at_most_twice, dtype: torch.dtype) -> None:
    setup = SETUPS["trained biases"]
    held, dwhole = inputs(dtype)[0][:12], inputs(dtype)[1]
    fine = exact(build(setup, dtype), SHARED.spread(held), True, dwhole)
    # What one held token answers for is the sum over the rows it stands in.
    dheld = torch.zeros(12, WIDTH, dtype=torch.float64).index_add(0, SHARED.whole_T, dwhole.double())
    fine["out"] = fine["out"][SHARED.first_U]
    fine["hidden"] = torch.zeros(12, WIDTH, dtype=torch.float64).index_add(0, SHARED.whole_T, fine["hidden"])
    plain = run(build(setup, dtype), held, True, dheld.to(dtype), None, SHARED)
    for keep in ("all", "input"):
        ours = run(build(setup, dtype), held, True, dheld.to(dtype), keep, SHARED)
        for name, value in ours.items():
            if value is not None:
                at_most_twice(f"{name} (keep {keep})", value.to(plain[name].dtype), plain[name], fine[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_bit(dtype: torch.dtype) -> None:
    hidden, dout = inputs(dtype)
    shipped = Keeping("input_on_host", wide=HostMemory(CPU, lane=1))
    results = [run(build(Setup(), dtype), hidden, True, dout, keep) for keep in (*KEEPS, shipped)]
    for name, value in results[0].items():
        for other in results[1:]:
            assert value is None or torch.equal(value, other[name]), name


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("stacked", [False, True], ids=["separate", "stacked"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_chunks_of_tokens_give_what_all_at_once_give(setup: Setup, stacked: bool, chunk: int) -> None:
    hidden, dout = inputs(torch.float32)
    results = []
    ways = Keeping("input", chunk), Keeping("input_and_attention", chunk)
    on_host = Keeping("input_on_host", chunk, spend_gradient=True)
    for keep in (Keeping("all"), *ways, on_host, replace(on_host, wide=HostMemory(CPU, lane=1))):
        layer = build(setup, torch.float32)
        if stacked:
            scratch = Scratch()
            layer.stack(lambda maps, scratch=scratch: DenseProduct(maps, scratch))
        results.append(run(layer, hidden, True, dout.clone(), keep))
    for name, value in results[0].items():
        for other in results[1:]:
            assert (value is None) == (other[name] is None), name
            if value is not None:
                # Gradients of order 1 to 10, sums over 17 tokens and at most 77 columns, in another order.
                torch.testing.assert_close(other[name], value, atol=2e-5, rtol=2e-5, msg=name)
    # Whether attention's output was kept or made again changes no bit.
    for name, value in results[1].items():
        assert all(value is None or torch.equal(value, other[name]) for other in results[2:]), name


@pytest.mark.parametrize("keep", ["input", "input_on_host"])
def test_chunks_of_common_beginnings_held_once(keep: Keep) -> None:
    hidden, dout = (x[:12] for x in inputs(torch.float32))
    whole = run(build(Setup(), torch.float32), hidden, True, dout, "all", SHARED)
    chunked = run(build(Setup(), torch.float32), hidden, True, dout, Keeping(keep, 5), SHARED)
    for name, value in chunked.items():
        if value is not None:
            torch.testing.assert_close(value, whole[name], atol=2e-5, rtol=2e-5, msg=name)


def test_the_incoming_gradient_is_written_over_where_it_may_be() -> None:
    """Several layers hand down one tensor."""
    hidden, dout = inputs(torch.float32)
    hidden.requires_grad_()
    tables = rope_tables(ROWS.positions_U, INV_FREQ, 1.0, torch.float32)
    keeping = Keeping("input", 4, spend_gradient=True)
    layers = build(Setup(), torch.float32), build(SETUPS["normed blocks"], torch.float32)
    out = run_layer(layers[1], run_layer(layers[0], hidden, tables, ROWS, keeping), tables, ROWS, keeping)
    dout = dout.clone()
    (dhidden,) = torch.autograd.grad(out, hidden, dout)
    assert dhidden.data_ptr() == dout.data_ptr()


@pytest.mark.parametrize("keep", ["all", "input"])
def test_gradients_add_up_over_passes(keep: Keep) -> None:
    hidden, dout = inputs(torch.float32)
    once, twice = build(Setup(), torch.float32), build(Setup(), torch.float32)
    run(once, hidden, True, dout, keep)
    run(twice, hidden, True, dout, keep)
    run(twice, hidden, True, dout, keep)
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert one.grad is None or torch.equal(2 * one.grad, two.grad), name


@pytest.mark.parametrize("keep", ["all", "input"])
def test_input_and_incoming_gradient_are_left_alone(keep: Keep) -> None:
    hidden, dout = inputs(torch.float32)
    run(build(Setup(), torch.float32), hidden, True, dout, keep)
    assert torch.equal(hidden, inputs(torch.float32)[0])
    assert torch.equal(dout, inputs(torch.float32)[1])


def test_output_belongs_to_the_caller() -> None:
    """Nothing that the backward reads is part of the output: writing over that may not spoil gradients."""
    hidden, dout = inputs(torch.float32)
    tables = rope_tables(ROWS.positions_U, INV_FREQ, 1.0, torch.float32)
    layers = build(Setup(), torch.float32), build(Setup(), torch.float32)
    for layer, factor in zip(layers, (1.0, 0.0)):
        out = run_layer(layer, hidden, tables, ROWS, "all")
        with torch.no_grad():
            out.mul_(factor)
        out.backward(dout)
    for (name, one), other in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_dropout_is_left_to_the_plain_layer() -> None:
    layer = build(Setup(), torch.float32)
    assert serves(layer)
    layer.mlp.up_proj.lora.dropout = 0.1
    assert not serves(layer)
    layer.mlp.up_proj.lora.enabled = False
    assert serves(layer)


@pytest.mark.parametrize(
    ("keep", "holds"), [("all", True), ("input_and_attention", True), ("input", False), ("input_on_host", False)]
)
def test_what_stays_between_forward_and_backward(keep: Keep, holds: bool) -> None:
    hidden, dout = inputs(torch.float32)
    tables = rope_tables(ROWS.positions_U, INV_FREQ, 1.0, torch.float32)
    out = run_layer(build(Setup(), torch.float32), hidden, tables, ROWS, keep)
    node = out.grad_fn
    assert (node.kept is not None) == holds
    assert [saved.shape for saved in node.saved_tensors] == ([] if keep == "input_on_host" else [hidden.shape])
    out.backward(dout)
    assert node.kept is None
