"""``nn.layer_node`` against the plain layer, and both against float64: output and every gradient by name."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from jebi.kernels.rope import rope_tables
from jebi.nn.attention import attend_rows
from jebi.nn.layer import DecoderLayer, LayerShape
from jebi.nn.layer_node import Keep, run_layer, serves
from jebi.nn.lora import Lora
from jebi.nn.rows import Rows, rows_from_lengths
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
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setup:
    """What varies between layers."""

    targets: tuple[str, ...] = ALL
    biases: bool = False
    trained_biases: bool = False
    enabled: bool = True
    packed: type[NF4Weight | Int8Weight] | None = None


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
}


def build(setup: Setup, dtype: torch.dtype) -> DecoderLayer:
    """A layer of random weights whose activations stay of order 1; equal numbers for equal setups and dtypes."""
    layer = DecoderLayer(LayerShape(WIDTH, 4, 2, HEAD, FFN, 1e-5, setup.biases, setup.biases), dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(layer.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        scaled = drawn * drawn.shape[1] ** -0.5 if drawn.dim() == 2 else 0.1 * drawn + (not name.endswith("bias"))
        path, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(path), leaf, nn.Parameter(scaled.to(dtype), requires_grad=False))
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


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and the output's gradient."""
    hidden, dout = torch.randn(2, sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    return hidden, dout


def exact(layer: DecoderLayer, hidden: Tensor, trained_input: bool, dout: Tensor) -> dict[str, Tensor | None]:
    """The layer written out in float64, from the layer's own (rounded) weights."""
    leaves = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}

    def norm(name: str, x: Tensor) -> Tensor:
        return leaves[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

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
        a, b = x.unflatten(-1, (-1, HEAD)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    hidden = hidden.double().requires_grad_(trained_input)
    x = norm("input_layernorm", hidden)
    q, k = (turn(linear(f"self_attn.{name}_proj", x)) for name in "qk")
    v = linear("self_attn.v_proj", x).unflatten(-1, (-1, HEAD))
    rows = []
    for start, end in pairwise(ROWS.starts):
        queries, keys, values = (y[start:end].transpose(0, 1) for y in (q, k, v))
        keys, values = (y.repeat_interleave(2, dim=0) for y in (keys, values))
        scores = queries @ keys.transpose(1, 2) / HEAD**0.5
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        rows.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    middle = hidden + linear("self_attn.o_proj", torch.cat(rows).flatten(-2))
    x = norm("post_attention_layernorm", middle)
    gate = linear("mlp.gate_proj", x)
    out = middle + linear("mlp.down_proj", gate / (1 + (-gate).exp()) * linear("mlp.up_proj", x))
    if out.requires_grad:
        out.backward(dout.double())
    return {"out": out.detach(), "hidden": hidden.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def run(
    layer: DecoderLayer, hidden: Tensor, trained_input: bool, dout: Tensor, keep: Keep | None, rows: Rows = ROWS
) -> dict[str, Tensor | None]:
    """The plain layer (``keep`` None) or the node: its output and every gradient."""
    hidden = hidden.clone().requires_grad_(trained_input)
    tables = rope_tables(rows.positions_U, INV_FREQ, 1.0, hidden.dtype)
    if keep is None:
        out = layer(hidden, *tables, lambda q, k, v: attend_rows(q, k, v, rows))
    else:
        out = run_layer(layer, hidden, tables, rows, keep)
    if out.requires_grad:
        out.backward(dout)
    return {"out": out.detach(), "hidden": hidden.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("trained_input", [True, False], ids=["inner layer", "first layer"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients(at_most_twice, dtype: torch.dtype, setup: Setup, trained_input: bool) -> None:
    hidden, dout = inputs(dtype)
    plain = run(build(setup, dtype), hidden, trained_input, dout, None)
    fine = exact(build(setup, dtype), hidden, trained_input, dout)
    for keep in ("all", "input", "input_on_host"):
        ours = run(build(setup, dtype), hidden, trained_input, dout, keep)
        assert ours.keys() == plain.keys()
        for name, value in ours.items():
            assert (value is None) == (plain[name] is None) == (fine[name] is None), name
            if value is not None:
                at_most_twice(f"{name} (keep {keep})", value, plain[name], fine[name])


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
                at_most_twice(f"{name} (keep {keep})", value, plain[name], fine[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_changes_no_bit(dtype: torch.dtype) -> None:
    hidden, dout = inputs(dtype)
    results = [run(build(Setup(), dtype), hidden, True, dout, keep) for keep in ("all", "input", "input_on_host")]
    for name, value in results[0].items():
        for other in results[1:]:
            assert value is None or torch.equal(value, other[name]), name


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


@pytest.mark.parametrize(("keep", "holds"), [("all", True), ("input", False), ("input_on_host", False)])
def test_what_stays_between_forward_and_backward(keep: Keep, holds: bool) -> None:
    hidden, dout = inputs(torch.float32)
    tables = rope_tables(ROWS.positions_U, INV_FREQ, 1.0, torch.float32)
    out = run_layer(build(Setup(), torch.float32), hidden, tables, ROWS, keep)
    node = out.grad_fn
    assert (node.kept is not None) == holds
    assert [saved.shape for saved in node.saved_tensors] == [hidden.shape]
    out.backward(dout)
    assert node.kept is None
