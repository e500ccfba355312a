"""The code of docs/ecosystem.md runs as it stands, on the tiny model in place of SmolLM2."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"

# Names that this transformers has replaced, used by PEFT and TRL; and no card to pin memory for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def test_the_pages_code_runs(
    tiny_llama: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    # What lm-eval needs is in a process of its own, and its tasks are on the hub: see test_lm_eval.
    script = "\n".join(block for block in blocks if "lm_eval" not in block)
    for name in ("smollm2-folder", "smollm2"):
        assert f'"{name}"' in script
        script = script.replace(f'"{name}"', repr(str(tiny_llama("worded"))))
    script = script.replace("max_seq_length=1024", "max_seq_length=128")
    path = tmp_path / "page.py"
    path.write_text(script, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    assert names["model"].adapter is None
    assert (tmp_path / "outputs" / "reward" / "adapter" / "adapter_config.json").is_file()
