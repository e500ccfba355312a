"""``jebi plan``: what a newcomer reads, what a program reads, and how quickly."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jebi.plan.cards import CARDS

ROOT = Path(__file__).resolve().parents[2]


def plan(*options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jebi", "plan", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


def facts(*options: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(*options, "--json", code=code).stdout)
    return found


def test_the_table_says_whether_it_fits_and_what_is_chosen() -> None:
    shown = plan("llama-3.1-8b", "--gpu", "h200").stdout
    assert shown.startswith(
        "llama-3.1-8b, its shape alone: 4-bit, LoRA r=16, rows of 2,048 tokens, 8 a step\nfits h200: "
    )
    for line in ("model 5.", "chosen", "all activations kept", "a step", "60 steps", "longest row", "smallest card"):
        assert line in shown


def test_what_does_not_fit_ends_with_2_and_the_way_out() -> None:
    shown = plan("llama-3.1-8b", "--gpu", "t4", "--set", "model.load_in_4bit=false", code=2).stdout
    assert "does not fit t4" in shown
    assert "GB too much" in shown
    assert "would fit      --set model.load_in_4bit=true" in shown
    assert "\na step" not in shown, "of what cannot run there is no time"


def test_programs_get_bytes_and_seconds() -> None:
    found = facts("llama-3.2-1b", "--gpu", "a100-40", "--memory", "16GB")
    assert found["fits"]
    assert (
        found["budget"]
        == 16 * 2**30
        >= found["peak"]
        == sum(i["bytes"] for i in found["items"] if i["where"] == "card")
    )
    low, high = found["step_seconds_range"]
    assert low < found["step_seconds"] < high
    assert found["cards"] == []
    every = facts("llama-3.2-1b", "--gpu", "t4", "--all-gpus")
    assert {"h100", "rtx4090"} < {card["gpu"] for card in every["cards"]}


def test_memory_alone_is_enough_for_everything_but_times() -> None:
    found = facts("llama-3.1-8b", "--memory", "24GB")
    assert found["fits"]
    assert found["step_seconds"] is found["tokens_per_second"] is None
    assert "name a card with --gpu" in plan("llama-3.1-8b", "--memory", "24GB").stdout


def test_every_card_is_one_line_of_a_terminal_and_float32_is_not_timed() -> None:
    shown = plan("llama-3.1-8b", "--gpu", "t4", "--all-gpus").stdout.splitlines()
    assert len(shown) == 2 + len(CARDS)
    assert max(map(len, shown)) <= 80
    settings = ("--set", "model.dtype=float32", "--set", "model.load_in_4bit=false")
    single = plan("llama-3.2-1b", "--gpu", "h100", *settings).stdout
    assert "32-bit, LoRA" in single
    assert "times are known of 16 bits" in single


def test_a_runs_file_says_the_rest() -> None:
    found = facts("--config", "examples/demo.yaml", "--gpu", "t4")
    assert found["model"] == "smollm2"
    assert found["steps"] == 64
    assert 1000 < found["step_tokens"] < 1300
    other = facts("qwen3-0.6b", "--config", "examples/demo.yaml", "--gpu", "t4", "--set", "lora.r=64")
    assert other["peak"] > found["peak"]


def test_rows_of_a_file_make_the_steps() -> None:
    found = facts("llama-3.2-1b", "--gpu", "l4", "--rows", "examples/data/train.jsonl")
    assert found["step_tokens"] < 8 * 400


def test_several_cards_are_planned_for_together() -> None:
    shown = plan("llama-3.1-70b", "--gpu", "h200", "--memory", "30GB", "--gpus", "2", "--shard").stdout
    assert "fits 2 x h200, each: 2" in shown
    for words in ("a step on each of 2 cards", "layers in 2 parts", "MB of gradients over NVLink", "of 2 single cards"):
        assert words in " ".join(shown.split())
    found = facts("llama-3.1-8b", "--gpu", "h200", "--gpus", "2")
    assert (found["ranks"], found["shares"], found["weights_sent"], found["gradients_sent"]) == (2, 1, 0, 167772168)
    assert found["step_tokens"] == 2 * 16384
    assert found["tokens_per_second"] == pytest.approx(found["step_tokens"] / found["step_seconds"])
    assert 0.99 < found["efficiency"] < 1
    assert "would fit      --gpus 2 --shard  (2" in plan("llama-3.1-70b", "--gpu", "rtx4090", code=2).stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "name a model"),
        (["smollm2", "--gpu", "t4", "--shard"], "say how many with --gpus"),
        (["nothing", "--gpu", "t4"], "Shapes that jebi knows"),
        (["smollm2", "--gpu", "voodoo"], "--gpu 'voodoo' is not known"),
        (["smollm2", "--gpu", "t4", "--memory", "much"], "--memory 'much' is no size"),
        (["smollm2", "--memory", "0.5"], "--memory '0.5' is of a card: name it with --gpu"),
        (["smollm2", "--gpu", "t4", "--set", "train.max_steps=abc"], "train.max_steps"),
        (
            ["smollm2", "--gpu", "t4", "--set", "train.max_step=3"],
            "'train.max_step' is unknown. Did you mean 'train.max_steps'",
        ),
        (
            ["--config", "examples/demo.yaml", "--set", "train.warmup=3"],
            "setting 'train.warmup' is unknown. Did you mean",
        ),
        (["--config", "examples/demo.yaml", "--set", "train.packing=true"], "train.packing: set data.packing instead"),
        (["smollm2", "--gpu", "t4", "--set", "train.per_device_train_batch_size=0"], "must be at least 1, not 0"),
        (["smollm2", "--gpu", "t4", "--set", "model.compute=fp8"], "'fp8' is not for t4"),
        (["smollm2", "--gpu", "t4", "--rows", "none.jsonl"], "--rows 'none.jsonl' cannot be read"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(options: list[str], says: str) -> None:
    done = plan(*options, code=2)
    assert done.stderr.startswith("jebi: ")
    assert says in done.stderr


def test_neither_torch_nor_transformers_is_imported() -> None:
    """They take two seconds to import, and the answer is to be there in one and a half."""
    code = (
        "import sys; from jebi.cli.main import app\n"
        "try: app(['plan', 'smollm2'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
