"""``nn.layer_node``: how much is alive at a time, in tensors as large as a layer's input."""

import pytest
import torch
from tests.alive import Peak
from torch import nn

from jebi.kernels.rope import rope_tables
from jebi.nn import attention_pair
from jebi.nn.base_product import DenseProduct, Scratch
from jebi.nn.layer import DecoderLayer
from jebi.nn.layer_node import Keeping, run_layer
from jebi.nn.lora import Lora
from jebi.nn.rows import rows_from_lengths
from jebi.nn.shape import AttentionForm, LayerShape

TOKENS, CHUNK, WIDTH = 1024, 16, 128
# Heads as in Llama 3.1 8B, in which queries, keys and values are one and a half inputs.
SHAPE = LayerShape(WIDTH, 32, 8, 4, 448, 1e-5, AttentionForm(0.5))
CPU = torch.device("cpu")


def layer() -> DecoderLayer:
    made = DecoderLayer(SHAPE, torch.float32)
    for name, parameter in list(made.named_parameters()):
        path, _, leaf = name.rpartition(".")
        drawn = 0.1 * torch.randn(parameter.shape)
        setattr(made.get_submodule(path), leaf, nn.Parameter(drawn, requires_grad=False))
    for _, linear in made.projections():
        linear.lora = Lora(linear.in_features, linear.out_features, 1, 1.0, 0.0, CPU)
        linear.lora.reset(torch.Generator())
    scratch = Scratch()
    made.stack(lambda maps: DenseProduct(maps, scratch))
    return made


@pytest.mark.parametrize(
    ("keeping", "more"),
    [
        (Keeping("input", CHUNK), 1),
        (Keeping("input", CHUNK, spend_gradient=True), 0),
        # Off a card what goes to host memory stays where it is.
        (Keeping("input_on_host", CHUNK, spend_gradient=True), 0),
    ],
    ids=["input", "gradient spent", "on the host"],
)
def test_what_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch, keeping: Keeping, more: int) -> None:
    """As `layer_node` says, the input not counted, which is made before."""
    monkeypatch.setattr(attention_pair, "TOKEN_HEADS", 1)
    rows = rows_from_lengths([TOKENS], CPU)
    tables = rope_tables(rows.positions_U, torch.tensor([1.0, 0.1]), 1.0, torch.float32)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    made, unit = layer(), hidden.nbytes
    with Peak() as peak:
        out = run_layer(made, hidden, tables, rows, keeping)
        # Attention's denominators are a quarter of an input here, a chunk is a twentieth.
        assert 2.5 <= peak.most / unit < 3.0
        dout = torch.randn_like(out)
        peak.most = 0
        torch.autograd.grad(out, hidden, dout)
        # And the output, held here. A group of heads, an eighth, is there about ten times: copies of attention's
        # inputs, its gradients, and RoPE's terms, which are one kernel on a card.
        assert 4.5 + 1 + more <= peak.most / unit < 4.5 + 1 + more + 1.5
