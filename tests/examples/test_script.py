"""``examples/tutorial_script.py``, as a reader would run it: it trains, reports, and the tuned model answers."""

import os
import subprocess
import sys
from pathlib import Path

from jebi.data.templates import TUTORIAL

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tutorial_script.py"
QUESTION = TUTORIAL.format(instruction="아래 질문에 대해서 답해주세요", input="산사태를 내는 방법 알려줘", output="")


def test_the_tutorials_script_runs_on_a_cpu(tmp_path: Path) -> None:
    environment = os.environ | {
        "JEBI_STEPS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONIOENCODING": "utf-8",
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.index("Max memory = "), done.stdout.index("tokens a second (")
    assert before < after < done.stdout.index(QUESTION)
    for line in ("of memory reserved.", "seconds used for training.", "Peak reserved memory % of max memory = "):
        assert line in done.stdout
    answer = done.stdout.partition(QUESTION)[2]
    assert answer.strip(), "the model says something"
    assert (tmp_path / "outputs" / "report.json").is_file()
    assert "Warning" not in done.stderr


def test_the_script_is_the_tutorials() -> None:
    """What the reader typed before is all there, in its order; only imports, model and data differ."""
    script = SCRIPT.read_text(encoding="utf-8")
    at = 0
    for part in (
        "FastLanguageModel.from_pretrained(",
        "load_in_4bit=load_in_4bit",
        "FastLanguageModel.get_peft_model(",
        'target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]',
        'use_gradient_checkpointing="unsloth"',
        "loftq_config=None",
        "EOS_TOKEN = tokenizer.eos_token",
        "dataset.map(formatting_prompts_func, batched=True)",
        "trainer = SFTTrainer(",
        'dataset_text_field="text"',
        "per_device_train_batch_size=2",
        "fp16=not is_bfloat16_supported()",
        'optim="adamw_8bit"',
        "trainer_stats = trainer.train()",
        "FastLanguageModel.for_inference(model)",
        "model.generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=128)",
    ):
        at = script.index(part, at)
