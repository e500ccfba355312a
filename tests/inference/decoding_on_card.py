"""The decoding engine on a CUDA card: ``python -m tests.inference.decoding_on_card``.

Captured prompts and steps against uncaptured ones and transformers' loop, tokens of rows alone and together, adapters
switched between replays, caches that outgrow their buffers, and that nothing is captured twice. Random float32 weights,
so that rounding does not choose the tokens; then bfloat16, dense, over 8 bits and over 4: there the logits of given
tokens are at most twice as far from float32's as the plain step's are, and where greedy tokens of rows alone and
together, or of the two steps, part, they do so at a tie.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from jebi.adapters.lora import attach
from jebi.adapters.peft_files import adapter_tensors
from jebi.config import LoraConfig, Storage
from jebi.inference import engine as engine_file
from jebi.inference.decoding import Decoding
from jebi.inference.engine import Engine, captures
from jebi.inference.generation import prepare
from jebi.models.files import find
from jebi.models.hf import JebiForCausalLM
from jebi.models.loading import load_model
from jebi.nn.layer_step import plain_step

DEVICE = torch.device("cuda")
KNOWN = 2000
STORAGES: tuple[Storage, ...] = ("dense", "int8", "nf4")


def checkpoint(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=KNOWN, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    # Rounded, so that float32 and bfloat16 quantise the same numbers.
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def made(folder: Path, dtype: torch.dtype, storage: Storage) -> JebiForCausalLM:
    files = find(str(folder))
    model = load_model(files, files.config(), dtype, DEVICE, storage)
    attach(model, LoraConfig(r=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).to(DEVICE))
    model.max_seq_length = 1024
    prepare(model, rows=(1, 4))
    assert all(layer.few_rows is not None for layer in model.model.decoder_layers())
    return model


def prompts() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, KNOWN, (4, 250), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((250, 31, 7, 120)):
        mask[row, : 250 - length] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


def answer(model: JebiForCausalLM, ids: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0} | settings
    return model.generate(ids, attention_mask=mask, **settings)


def check_tokens(model: JebiForCausalLM) -> None:
    """Against transformers' loop; the batch crosses a step of the cache's size at 256."""
    assert captures(model)
    ids, mask = prompts()
    ours = model.decoding
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
        {"max_new_tokens": 300},
    )
    for settings in cases:
        got = [answer(model, ids, mask, **settings) for _ in range(3)]  # first uncaptured, then captured, then replayed
        assert torch.equal(got[0], got[1])
        assert torch.equal(got[0], got[2])
        model.decoding = None
        expected = answer(model, ids, mask, **settings)
        model.decoding = ours
        print(f"{settings}: {(got[0] == expected).float().mean():.4f} of the tokens are transformers'")
        assert torch.equal(got[0], expected)
    ends = answer(model, ids, mask)[:, 255].tolist()
    early = answer(model, ids, mask, eos_token_id=ends)
    assert early.shape[1] <= 256


def check_alone(model: JebiForCausalLM) -> None:
    ids, mask = prompts()
    together = answer(model, ids, mask)
    for row, seen, said in zip(ids, mask, together, strict=True):
        alone = answer(model, row[seen.bool()][None], torch.ones_like(row[seen.bool()][None]))
        assert torch.equal(alone[0, -24:], said[-24:])


def check_switching(model: JebiForCausalLM) -> None:
    """Graphs with and without the adapter are both kept, and read what they were captured over."""
    ids, mask = prompts()
    tuned = answer(model, ids, mask)
    for _ in range(3):
        with model.disable_adapter():
            base = answer(model, ids, mask)
        assert torch.equal(answer(model, ids, mask), tuned)
    assert not torch.equal(base, tuned)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.mul_(0.5)
    changed = answer(model, ids, mask)
    assert not torch.equal(changed, tuned)
    ours, model.decoding = model.decoding, None
    model.drop_kept()  # casts of the adapter as it was, which transformers' loop reads
    assert torch.equal(changed, answer(model, ids, mask))
    model.decoding = ours


def check_growth(model: JebiForCausalLM) -> None:
    """Caches too large to be kept, or to be made at once: buffers move, graphs and their memory are made anew."""
    ids, mask = (x[1:3] for x in prompts())
    expected = answer(model, ids, mask, max_new_tokens=300)
    share, engine_file._SHARE = engine_file._SHARE, 2**50
    for _ in range(3):  # from the second answer on, a step is captured while the last one's logits are held
        assert torch.equal(answer(model, ids, mask, max_new_tokens=300), expected)
    engine_file._SHARE = share


def check_threads(model: JebiForCausalLM) -> None:
    """Answers asked for at once, some of which are captured meanwhile."""
    ids, mask = prompts()
    rows = [slice(start, end) for start in range(3) for end in range(start + 1, 5)]
    expected = [answer(model, ids[row], mask[row]) for row in rows]
    model.decoding = Decoding(Engine())
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda row: answer(model, ids[row], mask[row]), rows * 2))
    assert all(torch.equal(*pair) for pair in zip(got, expected * 2, strict=True))


def check_prompts(model: JebiForCausalLM) -> None:
    """Padded and captured against flat: logits and cache, with the adapter and without it, in a cache that has moved.

    Float32 products added in another order, over three layers: a token that sees padding is off in the first digits.
    """
    assert model.decoding is not None
    bar = 1e-4
    captured, flat = model.decoding.engine, Engine()
    for rows, most, on in product((slice(1), slice(4)), (300, 3000), (True, False)):
        ids, mask = (x[rows] for x in prompts())
        lengths = mask.sum(1).tolist()
        with torch.no_grad(), nullcontext() if on else model.disable_adapter():
            expected = flat.prefill(model, ids, lengths, most)
            for _ in range(3):
                got = captured.prefill(model, ids, lengths, most)
                assert (got - expected).abs().max() <= bar * expected.abs().max()
            ours, theirs = captured._batch, flat._batch
            assert ours is not None
            assert theirs is not None
            assert ("prompts", 256, captured._over) in ours.graphs
            assert not theirs.graphs
            assert ours.lengths_B.tolist() == lengths
            for mine, exact in zip(ours.cache._both(), theirs.cache._both(), strict=True):
                for row, length in enumerate(lengths):
                    off = (mine[:, row, :, :length] - exact[:, row, :, :length]).abs().max()
                    assert off <= bar * exact.abs().max()
            captured.release(model)
            flat.release(model)


def check_captures(model: JebiForCausalLM) -> None:
    """One row is captured by `prepare`, for every length up to the model's; nothing is captured after it.

    So are its prompts, of one token up to more than are captured.
    """
    count = 0
    capture = Engine._capture

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        capture(*arguments)

    Engine._capture = counted  # type: ignore[method-assign]
    ids, _ = prompts()
    long = ids.flatten()[None]
    for length in (1, 5, 128, 129, 250, 400, 900):
        answer(model, long[:, :length], torch.ones_like(long[:, :length]), max_new_tokens=100)
    assert count == 0, f"{count} captures after the warm-up"
    with torch.inference_mode():
        answer(model, ids[:1, :5], torch.ones_like(ids[:1, :5]))
    assert count == 0
    Engine._capture = capture  # type: ignore[method-assign]


def forced(model: JebiForCausalLM, engine: Engine, rows: slice) -> Tensor:
    """Logits (steps, B, V) of some rows, the tokens of whose answers are given; captured from the second run on."""
    ids, mask = (x[rows] for x in prompts())
    given = torch.randint(3, KNOWN, (len(ids), 12), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        for _ in range(3):
            logits = [engine.prefill(model, ids, mask.sum(1).tolist(), 300).clone()]
            for step in range(given.shape[1]):
                so_far = torch.cat((ids, given[:, : step + 1]), 1)
                logits.append(engine.step(model, so_far).clone())
            engine.release(model)
    return torch.stack(logits).float()


def check_rounding(model: JebiForCausalLM, exact: JebiForCausalLM) -> float:
    """Twice the plain step's error at most; returns that error, root mean square over the spread of the logits."""
    worst = 0.0
    for rows in (slice(1), slice(2), slice(4)):
        plain, fine = Engine(plain_step), Engine(plain_step)
        for on in (True, False):
            with nullcontext() if on else model.disable_adapter(), nullcontext() if on else exact.disable_adapter():
                truth = forced(exact, fine, rows)
                errors = [
                    ((forced(model, engine, rows) - truth).norm() / truth.norm()).item()
                    for engine in (model.decoding.engine, plain)  # type: ignore[union-attr]
                ]
            print(f"  {rows.stop} rows, adapter {on}: off by {errors[0]:.5f}, the plain step by {errors[1]:.5f}")
            assert errors[0] <= 2 * errors[1] + 1e-6, "the kernels' step is further off"
            worst = max(worst, *errors)
    return worst


def check_ties(model: JebiForCausalLM, error: float) -> None:
    """Greedy tokens of rows together and alone, and of the plain step: where they part, two logits were near."""
    ids, mask = prompts()
    ours = model.decoding
    for on in (True, False):
        with nullcontext() if on else model.disable_adapter():
            together = answer(model, ids, mask)[:, 250:]
            model.decoding = type(ours)(Engine(plain_step))  # type: ignore[call-arg, misc]
            plain = answer(model, ids, mask)[:, 250:]
            model.decoding = ours
            parted = 0
            for row, seen, first, second in zip(ids, mask, together, plain, strict=True):
                own = row[seen.bool()][None]
                alone = answer(model, own, torch.ones_like(own))[0, -24:]
                for other in (alone, second):
                    differs = (first != other).nonzero().flatten().tolist()
                    if differs:
                        parted += 1
                        at = differs[0]
                        with torch.no_grad():
                            logits = model(torch.cat((own[0], first[:at]))[None]).logits[0, -1].float()
                        gap = (logits[first[at]] - logits[other[at]]).abs() / logits.square().mean().sqrt()
                        assert gap < 8 * error, f"tokens part at a gap of {gap:.4f}, an error being {error:.4f}"
            print(f"  adapter {on}: {parted} of 8 answers part, each at a tie")


def check_speed(model: JebiForCausalLM) -> None:
    ids, _ = prompts()
    one = ids[:1, :128]
    for new in (1, 65):
        answer(model, one, torch.ones_like(one), max_new_tokens=new)
        torch.cuda.synchronize()
        began = time.perf_counter()
        answer(model, one, torch.ones_like(one), max_new_tokens=new)
        torch.cuda.synchronize()
        print(f"{new} tokens: {1e3 * (time.perf_counter() - began):.2f} ms")


def main() -> None:
    """Run every check."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        model = made(Path(folder), torch.float32, "dense")
        checks = check_captures, check_prompts, check_tokens, check_alone, check_switching, check_growth, check_threads
        for check in checks:
            check(model)
            print(f"{check.__name__}: passed")
        del model
        for storage in STORAGES:
            model = made(Path(folder), torch.bfloat16, storage)
            print(storage)
            check_captures(model)
            check_ties(model, check_rounding(model, made(Path(folder), torch.float32, storage)))
            ids, mask = prompts()
            assert torch.equal(answer(model, ids, mask), answer(model, ids, mask))
            check_speed(model)


if __name__ == "__main__":
    main()
