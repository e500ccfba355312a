"""Training in float16 on a card, beside bfloat16 and float32 on the same rows: 30 steps each through `SFTTrainer`.

    python tests/training/fp16_on_card.py [CHECKPOINT]

Without a checkpoint a small random Llama is made, one of whose gated products is beyond float16's largest number.
Prints losses, the loss scale and skipped steps, and fails where a run is off. Meant for a card of compute capability
8.0 or newer, where passes are captured and bfloat16 is there to compare with; on an older one bfloat16 is left out.
"""

import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jebi import FastLanguageModel, SFTConfig, SFTTrainer
from jebi.models.device import default_device

STEPS, RATE, VOCABULARY = 30, 5e-4, 2048
OWN_SCALE, QUIET, EXCESSIVE = 2.0**16, 2.0**10, 2.0**40
"""Where torch's scaler begins; where no step should be skipped; where the first ones must be."""


@dataclass
class Run:
    """What a training said."""

    losses: list[float]
    norms: list[float]
    scale: float | None
    skipped: int
    graphs: int


def make_checkpoint(folder: Path) -> None:
    """A Llama of four layers, its hidden states of order 1, and one massive channel in the second layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        layer: Any = model.model.layers[1]
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[3] *= 150
        layer.mlp.down_proj.weight[:, 3] /= (
            1000  # or the stream would be this one channel's, and every rounding would tell
        )
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def rows() -> list[list[int]]:
    """Eight a step, of 24 to 400 tokens, half of them with a beginning in common; 60 different tokens."""
    drawn = random.Random(0)
    shared = [drawn.randrange(3, 63) for _ in range(20)]
    made = []
    for number in range(8 * STEPS):
        length = int(min(max(drawn.lognormvariate(4.8, 0.6), 24), 400))
        made.append([1, *(shared if number % 2 else []), *(drawn.randrange(3, 63) for _ in range(length)), 2])
    return made


def train(path: str, dtype: torch.dtype, scale: float | None = None) -> Run:
    """One training; ``scale`` is where the loss scale begins."""
    device = default_device()
    model, tokenizer = FastLanguageModel.from_pretrained(path, 1024, dtype, load_in_4bit=False, device=str(device))
    FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=1)
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_8bit", logging_steps=1, report_to="none",
        save_strategy="no", seed=0, fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, disable_tqdm=True,
        allow=["missing-eos"],
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows()})
    trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=data, max_seq_length=1024, args=args)
    scaler = trainer.accelerator.scaler
    assert (scaler is not None) == (dtype == torch.float16), "accelerate scales the loss with fp16=True alone"
    if scaler is not None and scale is not None:
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    skipped = captured = 0
    inner = trainer._maybe_log_save_evaluate

    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal skipped, captured
        graphs = trainer._engine._graphs
        captured = len(graphs._captured) if graphs is not None else 0
        skipped += int(trainer.accelerator.optimizer_step_was_skipped)
        inner(*args, **kwargs)

    trainer._maybe_log_save_evaluate = counted  # type: ignore[method-assign]
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in log]
    end = scaler.get_scale() if scaler is not None else None
    return Run([entry["loss"] for entry in log], norms, end, skipped, captured)


def apart(run: Run, other: Run) -> float:
    """Mean relative distance of two loss curves."""
    one, two = Tensor(run.losses), Tensor(other.losses)
    return ((one - two).abs() / two).mean().item()


def show(name: str, run: Run) -> None:
    """Print a run in three lines."""
    print(f"{name}: scale at the end {run.scale}, skipped {run.skipped}, graphs {run.graphs}")
    print("  losses", *(f"{loss:.4f}" for loss in run.losses))
    print("  norms ", *(f"{norm:.3g}" for norm in run.norms))


def main() -> None:
    """Train them all and compare."""
    if not torch.cuda.is_available():
        sys.exit("this needs a card")
    folder = tempfile.mkdtemp()
    path = sys.argv[1] if len(sys.argv) > 1 else folder
    if path == folder:
        make_checkpoint(Path(folder))
    captures = torch.cuda.get_device_capability() >= (8, 0)
    runs = {"float32": train(path, torch.float32)}
    if captures:
        runs["bfloat16"] = train(path, torch.bfloat16)
    runs["float16, a quiet scale"] = train(path, torch.float16, QUIET)
    runs["float16"] = train(path, torch.float16)
    runs["float16, an excessive scale"] = train(path, torch.float16, EXCESSIVE)
    for name, run in runs.items():
        show(name, run)
    exact, quiet, excessive = runs["float32"], runs["float16, a quiet scale"], runs["float16, an excessive scale"]
    allow = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert allow, "a training leaves torch's setting as it was"
    for name, run in runs.items():
        assert all(loss < 1.02 * run.losses[0] for loss in run.losses), f"{name}: a loss is far off"
        assert run.losses[-1] < run.losses[0] - 0.05, f"{name}: nothing was learnt"
        assert bool(run.graphs) == (captures and name != "float32"), f"{name}: captured {run.graphs}"
    assert quiet.skipped == 0, "the quiet scale overflows"
    # float16 has three bits more than bfloat16, so it is nearer to float32; where both are next to it, 1e-3 is granted.
    bar = max(1e-3, apart(runs["bfloat16"], exact)) if captures else 5e-3
    print(f"apart from float32: float16 {apart(quiet, exact):.2e}, bar {bar:.2e}")
    assert apart(quiet, exact) <= bar
    # The norm is that of gradients without their scale. Roundings of float16 in a few dozen steps: 1 %.
    assert abs(quiet.norms[0] / exact.norms[0] - 1) < 0.01, "the gradients are not what they are without a scale"
    for run, begin in ((runs["float16"], OWN_SCALE), (excessive, EXCESSIVE)):
        assert run.scale == begin / 2**run.skipped, "every skipped step halves the scale, and nothing else changes it"
    assert 10 <= excessive.skipped < STEPS - 3, "the first steps should overflow, and then no more"
    print("all as it should be")


if __name__ == "__main__":
    main()
