"""What jebi promises from outside: its names, an import without effects, types, and sources of a readable size."""

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

import jebi

SOURCE = Path(__file__).resolve().parents[1] / "src" / "jebi"
FILES = sorted(SOURCE.rglob("*.py"))

MOST_LINES = 350
MOST_LINES_OF_A_FUNCTION = 80


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names() -> None:
    assert sorted(jebi.__all__) == [
        "FastLanguageModel",
        "SFTConfig",
        "SFTTrainer",
        "is_bfloat16_supported",
        "train_on_responses_only",
    ]
    for name in jebi.__all__:
        assert getattr(jebi, name).__name__ == name
        assert getattr(jebi, name).__doc__


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'jebi' has no attribute 'FastVisionModel'"):
        _ = jebi.FastVisionModel


def test_importing_jebi_brings_nothing_along() -> None:
    """No third-party module is loaded, so none can have been patched; nothing is said, and no file is touched."""
    code = """
import sys
before = set(sys.modules)
import jebi
jebi.__version__, jebi.__all__
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    assert run(code) == "['jebi']\n"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_it_was_after_an_import(enabled: bool) -> None:
    """It rests meanwhile: what it still does is of the few modules before and of one round after."""
    code = f"""
import gc
{"" if enabled else "gc.disable()"}
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
from jebi import SFTConfig
print(gc.isenabled(), len(runs))
"""
    found, runs = run(code).split()
    assert found == str(enabled)
    assert int(runs) < 100  # without the rest over a thousand


def test_nor_does_an_import_that_fails_leave_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jebi._HOMES, "Broken", "jebi.nowhere")
    with pytest.raises(ModuleNotFoundError):
        _ = jebi.Broken
    assert gc.isenabled()


IMPORTS = """
import sys
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel{trainer}
from transformers import PreTrainedTokenizerBase
before = set(sys.modules)
from jebi import {name}
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names))
"""


@pytest.mark.parametrize(
    ("name", "trainer"),
    [("FastLanguageModel", ""), ("SFTConfig", ", TrainingArguments, Trainer"), ("SFTTrainer", ", Trainer")],
)
def test_its_classes_bring_along_what_their_bases_do_and_no_more(name: str, trainer: str) -> None:
    """Imports are most of the start of a short job, and transformers' are not ours to spare.

    A name of `jebi` loads no package that PreTrainedModel and Trainer have not loaded, and a model needs no Trainer.
    """
    assert run(IMPORTS.format(name=name, trainer=trainer)) == "['jebi']\n"


def test_using_jebi_patches_nothing() -> None:
    """Classes and functions of other libraries are the same objects before and after every module of jebi is loaded."""
    code = """
import pkgutil, sys
import torch, torch.nn.functional, transformers, safetensors.torch, datasets, accelerate
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
watched = [
    torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.autograd.Function, torch.optim.Optimizer, torch.nn.functional,
    GenerationMixin, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer, datasets.Dataset,
    accelerate.Accelerator, safetensors.torch,
]
before = [dict(vars(thing)) for thing in watched]
import jebi
for module in pkgutil.walk_packages(jebi.__path__, "jebi."):
    if module.name != "jebi.__main__":
        __import__(module.name)
for name in jebi.__all__:
    getattr(jebi, name)
for thing, had in zip(watched, before):
    now = vars(thing)
    names = now.keys() | had.keys() - {"__abstractmethods__", "_abc_impl"}
    changed = {name for name in names if now.get(name) is not had.get(name)}
    assert not changed, (thing, changed)
print(len([name for name in sys.modules if name.startswith("jebi.")]))
"""
    assert int(run(code)) > 50


def test_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES, f"{path} is too long: divide it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} in {path} has {lines} lines: divide it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text))
