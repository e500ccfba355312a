"""A short training, run by `test_accelerate` with a launcher around it: ``train_on_ranks.py SETTINGS.json``.

The settings are `SFTConfig`'s, and under ``"script"`` the model's folder and the rows' texts. Every rank leaves its
adapter as ``rank-N.safetensors`` in the output folder, with what it knows of the run in ``rank-N.json``.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file

from jebi import FastLanguageModel, SFTConfig, SFTTrainer
from jebi.adapters.peft_files import adapter_tensors


def main() -> None:
    """Train as the settings say and write down what came of it."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script = settings.pop("script")
    torch.set_num_threads(1)
    args = SFTConfig(**settings)
    model, tokenizer = FastLanguageModel.from_pretrained(script["model"], 128, torch.float32, script["load_in_4bit"])
    FastLanguageModel.put_adapter(model, script["start"])
    rows = {name: Dataset.from_dict({"text": script[name]}) for name in ("train", "eval")}
    trainer = SFTTrainer(model, tokenizer, rows["train"], rows["eval"], args=args)
    trainer.train()
    metrics = trainer.evaluate()
    folder, rank = Path(args.output_dir), args.process_index
    save_file(adapter_tensors(model), folder / f"rank-{rank}.safetensors")
    known = {
        "ranks": args.world_size,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval_loss": metrics["eval_loss"],
        "best": trainer.state.best_model_checkpoint,
        "tokens": trainer.report.tokens,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(known), encoding="utf-8")


if __name__ == "__main__":
    main()
