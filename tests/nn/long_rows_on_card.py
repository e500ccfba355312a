"""A few layers of Llama 3.1 8B's shape on a card: chunks of tokens and host memory against everything kept.

    python tests/nn/long_rows_on_card.py

First 20,000 tokens: output, input gradient and adapter gradients of each way of keeping, against all kept in one piece.
Then times and peaks of longer rows, in tensors as large as the input.
"""

import sys
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

from jebi.kernels.rope import rope_tables
from jebi.nn.base_product import DenseProduct, Scratch
from jebi.nn.host_memory import HostMemory
from jebi.nn.layer import DecoderLayer
from jebi.nn.layer_node import Keeping, run_layer
from jebi.nn.lora import Lora
from jebi.nn.rows import rows_from_lengths
from jebi.nn.shape import AttentionForm, LayerShape
from jebi.quant.nf4 import NF4Weight

CARD = torch.device("cuda", 0)
SHAPE = LayerShape(4096, 32, 8, 128, 14336, 1e-5, AttentionForm(128**-0.5))
LAYERS = 4


WAYS = {
    "all kept": Keeping("all"),
    "input and attention kept": Keeping("input_and_attention", spend_gradient=True),
    "input kept": Keeping("input"),
    "input kept, gradient spent": Keeping("input", spend_gradient=True),
    "on the host": Keeping("input_on_host", spend_gradient=True),
    "on the host, gate and up of every second layer too": Keeping("input_on_host", spend_gradient=True),
}


def layers() -> list[DecoderLayer]:
    """Layers of random 4-bit weights with adapters, laid together as on a card."""
    torch.manual_seed(0)
    scratch, made = Scratch(), []
    for _ in range(LAYERS):
        layer = DecoderLayer(SHAPE, torch.bfloat16)
        for name, parameter in list(layer.named_parameters()):
            path, _, leaf = name.rpartition(".")
            if parameter.dim() == 1:
                setattr(layer.get_submodule(path), leaf, nn.Parameter(torch.ones_like(parameter, device=CARD), False))
        for _, linear in layer.projections():
            weight = torch.randn(linear.out_features, linear.in_features, device=CARD) * linear.in_features**-0.5
            linear.store(NF4Weight.quantize(weight))
            linear.lora = Lora(linear.in_features, linear.out_features, 16, 1.0, 0.0, CARD)
            nn.init.normal_(linear.lora.A_rK, std=linear.in_features**-0.5)
            nn.init.normal_(linear.lora.B_Nr, std=0.01)
        layer.stack(lambda maps: DenseProduct(maps, scratch))
        made.append(layer.to(CARD))
    return made


def run(model: list[DecoderLayer], lengths: list[int], way: str) -> tuple[dict[str, Tensor], float, float]:
    """Gradients by name and the output's first tokens; seconds; the peak, in tensors as large as the input.

    Beside what it counts as its own, the peak has the input, which is kept here, and the output.
    """
    rows = rows_from_lengths(lengths, CARD)
    frequencies = 500000.0 ** -(torch.arange(0, 128, 2, device=CARD) / 128)
    tables = rope_tables(rows.positions_U, frequencies, 1.0, torch.bfloat16)
    generator = torch.Generator(CARD).manual_seed(1)
    before = torch.cuda.memory_allocated()
    leaf, dout = (
        torch.randn(sum(lengths), SHAPE.width, generator=generator, device=CARD, dtype=torch.bfloat16) for _ in range(2)
    )
    leaf.requires_grad_()
    keeping = WAYS[way]
    if keeping.keep == "input_on_host":
        keeping = replace(keeping, host=HostMemory(CARD))
    wide = HostMemory(CARD, lane=1) if "every second" in way else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    hidden: Tensor = leaf
    for number, layer in enumerate(model):
        hidden = run_layer(layer, hidden, tables, rows, replace(keeping, wide=wide) if number % 2 else keeping)
    launched = time.perf_counter()
    hidden.backward(dout)
    host = time.perf_counter()
    torch.cuda.synchronize()
    end = time.perf_counter()
    print(f"  host: forward {launched - start:.3f} s, backward {host - launched:.3f} s; all {end - start:.3f} s")
    peak = (torch.cuda.max_memory_allocated() - before) / leaf.nbytes
    results = {"out": hidden[:1000].detach().clone(), "input": leaf.grad[-1000:].clone()}
    for number, layer in enumerate(model):
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                results[f"{number}.{name}"], parameter.grad = parameter.grad, None
    return results, end - start, peak


def main() -> None:
    """Compare, then measure."""
    model = layers()
    for lengths in ([20000], [9000, 11000]):
        whole, *_ = run(model, lengths, "all kept")
        for way in WAYS:
            results, _, _ = run(model, lengths, way)
            off = {
                name: ((value.float() - results[name].float()).norm() / value.float().norm()).item()
                for name, value in whole.items()
            }
            name = max(off, key=lambda name: off[name])
            print(f"{lengths} {way}: at most {off[name]:.2e} apart ({name})")
            # Attention's backward adds up in any order on a card, in bfloat16 that is up to a few of its roundings.
            if not off[name] < 4 * torch.finfo(torch.bfloat16).eps:
                sys.exit(f"{way}: {name} is off")
    for length in (16384, 65536, 131072):
        for way in WAYS:
            if way == "all kept" and length > 16384:
                continue
            run(model, [length], way)
            _, seconds, peak = run(model, [length], way)
            print(f"{length} {way}: {length / seconds:.0f} tokens/s of {LAYERS} layers, peak {peak:.2f} inputs")


if __name__ == "__main__":
    main()
