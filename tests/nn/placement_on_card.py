"""Embedding and head in host memory, for a card: rows, slices, losses, gradients, graphs, and the memory that is freed.

    python tests/nn/placement_on_card.py
    python tests/nn/placement_on_card.py cpu

Prints one line a check and fails at the first that is off; ``cpu`` runs what needs no card. Sizes are those of Llama
3.1 8B's head, but for the models, which are small.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig, Places
from jebi.data.heldout import inputs_of
from jebi.data.passes import Pass, collate, cut
from jebi.kernels.gather import gather
from jebi.kernels.linear_cross_entropy import linear_cross_entropy
from jebi.kernels.sliced_cross_entropy import sliced_cross_entropy
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import load_model
from jebi.models.placement import place, placed
from jebi.nn import slices as slices_module
from jebi.nn.host_weight import HostWeight
from jebi.nn.slices import WeightSlices
from jebi.plan.places import reliefs
from jebi.quant.int8 import Int8Weight
from jebi.quant.nf4 import NF4Weight
from jebi.training.graphs import PassGraphs, padded

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda:0")
ON_CARD = DEVICE.type == "cuda"
VOCABULARY, WIDTH, TOKENS = (128_256, 4096, 4000) if ON_CARD else (3000, 64, 50)
DTYPE = torch.bfloat16
HOST = Places("host", "host") if ON_CARD else Places()
TOKENS_KNOWN = 96_000
"""Of the small model, whose head is larger than two slices."""
SLICES = 2 * slices_module.SLICE_BYTES


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32) * scale).to(DTYPE)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds, the third time."""
    for _ in range(3):
        if ON_CARD:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if ON_CARD:
            torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same out of a CUDA graph."""
    if not ON_CARD:
        return run
    run()
    graph, out = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        out.append(run())

    def again() -> Tensor:
        graph.replay()
        return out[0]

    return again


def check_rows() -> None:
    table = drawn(VOCABULARY, WIDTH)
    host = HostWeight(table, DEVICE)
    assert host.locked == ON_CARD
    ids = torch.randint(VOCABULARY, (1, TOKENS), device=DEVICE)
    assert torch.equal(gather(host.weight_NK, ids), F.embedding(ids, table))
    run = captured(lambda: gather(host.weight_NK, ids))
    ids.copy_(torch.randint(VOCABULARY, (1, TOKENS), device=DEVICE))
    assert torch.equal(run(), F.embedding(ids, table))
    spent = timed(lambda: gather(host.weight_NK, ids))
    speed = ids.numel() * WIDTH * 2 / spent / 1e6
    print(f"rows: equal, in a graph too; {TOKENS} of them in {spent:.2f} ms, {speed:.1f} GB/s")


def check_slices() -> None:
    table = drawn(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
    weights = {"host": HostWeight(table, DEVICE), "nf4": NF4Weight.quantize(table), "int8": Int8Weight.quantize(table)}
    hidden, labels = drawn(TOKENS, WIDTH, seed=1), torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)
    for name, weight in weights.items():
        slices = WeightSlices(weight, DTYPE)
        dense = weight.dense() if isinstance(weight, HostWeight) else weight.dense(DTYPE)

        def whole(slices: WeightSlices = slices) -> Tensor:
            return torch.cat([part.clone() for part in slices])

        for run in (whole, captured(whole)):
            assert torch.equal(run(), dense), name
        results = []
        for form in ("slices", "dense", "float32"):
            leaf = (hidden.float() if form == "float32" else hidden.clone()).requires_grad_()

            def loss_of(
                leaf: Tensor = leaf, form: str = form, dense: Tensor = dense, slices: WeightSlices = slices
            ) -> Tensor:
                if form == "slices":
                    return sliced_cross_entropy(leaf, slices, labels)
                return linear_cross_entropy(leaf, dense.to(leaf.dtype), labels)

            loss = loss_of()
            loss.backward()
            results.append((loss.detach().double(), leaf.grad.double()))
            if form != "float32":
                print(f"{name} {form}: {timed(loss_of):.1f} ms for {TOKENS} tokens")
        for kind, ours, plain, exact in zip(("loss", "gradient"), *results):
            own, other = (ours - exact).norm() / exact.norm(), (plain - exact).norm() / exact.norm()
            print(f"{name} {kind}: off by {own:.2e}, the dense form by {other:.2e}")
            assert own <= 2 * max(other, torch.finfo(torch.float32).eps)


def checkpoint(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=TOKENS_KNOWN, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(DTYPE).save_pretrained(folder)


def made(folder: Path, places: Places) -> JebiForCausalLM:
    files = find(str(folder))
    model = load_model(files, files.config(), DTYPE, DEVICE, "nf4", places)
    attach(model, LoraConfig(r=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator).to(DEVICE))
    model.model.stack(keep=False)
    return model.train()


def passes() -> list[Pass]:
    rows = []
    for number, length in enumerate((500, 300, 700, 900)):
        ids = torch.randint(TOKENS_KNOWN, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        rows.append({"input_ids": ids, "labels": ids, "row": [number], "lengths": [length]})
    return cut([collate(rows)], 1600)


def trained(model: JebiForCausalLM, graphs: bool) -> dict[str, Tensor]:
    """Loss and gradients of the passes, run three times, so that graphs are replayed."""
    losses: list[Tensor] = []
    runner = PassGraphs(model, lambda loss: loss.backward(), {}) if graphs else None
    for _ in range(3):
        model.zero_grad()
        losses = []
        for part in passes():
            if runner is not None:
                losses.append(runner.run(padded(part), 2400).clone())
            else:
                loss = model(**inputs_of(part, DEVICE), num_items_in_batch=2400).loss
                loss.backward()
                losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | {name: p.grad.clone() for name, p in adapter_tensors(model).items()}


def check_training(folder: Path) -> None:
    slices_module.SLICE_BYTES = 4 * 2**20  # several slices of the small head, too
    card = trained(made(folder, Places()), False)
    for places in (Places("host") if ON_CARD else Places(), HOST):
        for graphs in (False, True) if ON_CARD else (False,):
            model = made(folder, places)
            assert model.device == DEVICE
            assert (PassGraphs.hindrance(model) is None) == ON_CARD
            ours = trained(model, graphs)
            worst = max(((ours[name] - value).norm() / value.norm()).item() for name, value in card.items())
            print(f"{placed(model)}, graphs {graphs}: losses and gradients off by {worst:.1e} at most")
            # The embedding's rows are the same; over slices a gradient of bfloat16 is rounded otherwise, twice.
            assert worst <= 4 * torch.finfo(DTYPE).eps
    ids, logits = torch.arange(3, 20, device=DEVICE)[None], []
    for places in (Places(), HOST, Places("auto", "nf4")):
        model = made(folder, places).eval()
        model.model.unstack()
        with torch.no_grad():
            logits.append(model(ids).logits.float())
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert answer.shape == (1, 25)
    off = ((logits[1] - logits[0]).norm() / logits[0].norm()).item()
    print(f"logits: off by {off:.1e}")
    assert off <= torch.finfo(DTYPE).eps


def check_memory(folder: Path) -> None:
    files = find(str(folder))
    table = TOKENS_KNOWN * 512 * 2
    peaks = []
    for places in (Places(), HOST):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = load_model(files, files.config(), DTYPE, DEVICE, "nf4", places)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        held = torch.cuda.memory_allocated()
        if places == Places():
            options = reliefs(model.model.shape, 2, Places())
            assert len(options) == 3
            for option, frees in zip(options[1:], (table, 2 * table)):
                place(model, option.places)
                freed = held - torch.cuda.memory_allocated()
                print(f"{option.places}: {freed:,} bytes freed, {option.frees:,} predicted with two slices' room")
                assert freed == frees
                assert option.frees in (frees, frees - SLICES)
            place(model, Places())
            assert torch.cuda.memory_allocated() == held
        else:
            assert all(not isinstance(p, nn.Parameter) or p.shape[0] != TOKENS_KNOWN for p in model.parameters())
        del model
    print(f"loading: at most {peaks[0]:,} bytes with the tables on the card, {peaks[1]:,} without")
    assert peaks[0] - peaks[1] >= 2 * table - 4 * 2**20  # what a projection takes while it is quantised


def main() -> None:
    """Run every check."""
    check_rows()
    check_slices()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        check_training(Path(folder))
        if ON_CARD:
            check_memory(Path(folder))


if __name__ == "__main__":
    main()
