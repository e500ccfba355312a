"""A short training, which `test_accelerate` runs alone and under accelerate's launcher: ``train_on_ranks.py RUN.json``.

The file holds `SFTConfig`'s settings and, under "script", the model, an adapter to start from and the rows. Every
process leaves ``rank-N.safetensors``, its adapter, in the output folder, and ``rank-N.json``, what it knows of the run;
then it goes on once more from the checkpoint of step 2 and leaves ``resumed-N.safetensors``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file

from jebi import FastLanguageModel, SFTConfig, SFTTrainer
from jebi.adapters.peft_files import adapter_tensors


def main(path: Path) -> None:
    """Train as ``path`` says and write down what came of it."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    script = settings.pop("script")
    trainer = make_trainer(SFTConfig(**settings), script)
    trainer.train()
    assert trainer.report is not None
    known = {
        "ranks": trainer.args.world_size,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "heldout_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "best": trainer.state.best_model_checkpoint,
        "tokens": trainer.report.tokens,
    }
    folder, rank = Path(settings["output_dir"]), trainer.args.process_index
    save_file(adapter_tensors(trainer.model), folder / f"rank-{rank}.safetensors")
    (folder / f"rank-{rank}.json").write_text(json.dumps(known), encoding="utf-8")

    resumed = make_trainer(SFTConfig(**settings | {"save_strategy": "no", "load_best_model_at_end": False}), script)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    save_file(adapter_tensors(resumed.model), folder / f"resumed-{rank}.safetensors")


def make_trainer(args: SFTConfig, script: dict[str, Any]) -> SFTTrainer:
    """A trainer of a model that was loaded anew."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        script["model"], 128, torch.float32, script["load_in_4bit"], device="cpu"
    )
    FastLanguageModel.put_adapter(model, script["start"])
    rows, heldout = (Dataset.from_dict({"text": script[name]}) for name in ("rows", "heldout"))
    return SFTTrainer(model, tokenizer, rows, heldout, args=args)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
