"""What the READMEs and docs name exists: their links, their make targets, and their commands with every option."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"^    make (\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert target in targets, f"{page.name} names make {target}"


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_commands_have_the_options_that_are_shown(name: str) -> None:
    shown = re.findall(r"^    jebi (\w+)([^#\n]*)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {command for command, _ in shown} == {
        "bench",
        "inspect",
        "models",
        "plan",
        "train",
        "chat",
        "compare",
        "version",
    }
    for command, rest in shown:
        help_text = subprocess.run(
            [sys.executable, "-m", "jebi", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in help_text, f"{name}: jebi {command} has no {option}"
        for path in re.findall(r"examples/\S+", rest):
            assert (ROOT / path).exists()


def test_the_readmes_are_twins() -> None:
    """The same commands and figures in both languages."""
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    for pattern in (r"^    (?:jebi|make) [^#\n]*?(?=\s*(?:#|$))", r"\| [\d.]+ → [\d.]+ GB \|", r"\| 0\.\d{4} \|"):
        assert re.findall(pattern, english, flags=re.MULTILINE) == re.findall(pattern, korean, flags=re.MULTILINE)


def test_the_commands_of_planning_run() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    jebi (plan [^#\n]*)", page, flags=re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "jebi", *command.split()], capture_output=True, text=True, check=True, cwd=ROOT
        )
        assert "fits" in done.stdout
