"""lm-eval takes jebi's model as its ``HFLM(pretrained=model)`` and finds what it finds with transformers' model.

It is installed apart from the other packages (see lm_eval_requirements.txt), so it runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jebi.adapters.peft_files import adapter_tensors
from jebi.fast import FastLanguageModel

SITE = Path(__file__).resolve().parents[2] / ".testdata" / "lm-eval"


@pytest.mark.skipif(not (SITE / "lm_eval").is_dir(), reason="`make test` installs lm-eval")
def test_lm_eval(tiny_llama: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(tiny_llama("worded"))
    model, _ = FastLanguageModel.from_pretrained(folder, 128, torch.float32, False, device="cpu")
    FastLanguageModel.get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    model.save_pretrained(tmp_path)
    paths = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("evaluate_twins.py")), folder, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    assert ours["metrics"] == theirs["metrics"]
    assert {"tiny_choice/acc,none", "tiny_writing/exact_match,none"} <= ours["metrics"].keys()
    assert ours["answers"]["tiny_writing"] == theirs["answers"]["tiny_writing"]
    assert len({text for (text,) in ours["answers"]["tiny_writing"]}) > 1
    for options, expected in zip(ours["answers"]["tiny_choice"], theirs["answers"]["tiny_choice"], strict=True):
        for (value, greedy), (expected_value, expected_greedy) in zip(options, expected, strict=True):
            # Sums of a few log-probabilities of order 10 in float32.
            assert value == pytest.approx(expected_value, rel=1e-5)
            assert greedy == expected_greedy
