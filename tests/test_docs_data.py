"""docs/data.md: its settings are settings, its rows are read, its tables list all there is."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from jebi.config import run_from_dict
from jebi.data.formats import FORMATS, read_row, recognise
from jebi.data.mixing import read_sources
from jebi.data.preparation import Learn
from jebi.data.templates import DEFAULTS, NAMED, check

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def tables() -> list[dict[str, list[str]]]:
    """Each table's rows by the name in the first cell."""
    made = []
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]
        made.append({re.split("`", row[0])[1] if row[0].startswith("`") else row[0]: row[1:] for row in cells})
    return made


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_are_settings(block: str) -> None:
    data = run_from_dict(yaml.safe_load(block)).data
    assert read_sources(data.train, "data.train")


def test_rows_are_of_every_format_and_are_read() -> None:
    found = set()
    for line in "".join(blocks("jsonl")).splitlines():
        row: dict[str, Any] = json.loads(line)
        form = recognise(row)
        found.add(form.name)
        if form.read is not None:
            assert read_row(form, row, 0, {}).last_answer in ("3", "It is 3.")
    assert found == set(FORMATS)


def test_the_tables_list_all_there_is() -> None:
    formats, templates, learning = tables()
    assert set(formats) == set(FORMATS)
    for form in FORMATS.values():
        needed, read = formats[form.name]
        assert tuple(re.findall(r"`(\w+)`", needed)) == form.needs
        assert tuple(re.findall(r"`(\w+)`", read)) == (*form.optional, "weight")
    for name in (*NAMED, "chat"):
        check(name)
        defaults = re.findall(r"`(\w+)`", templates[name][1])
        assert sorted(defaults) == sorted(form for form, template in DEFAULTS.items() if template == name)
    assert set(learning) == set(get_args(Learn))


def test_the_call_is_unsloths() -> None:
    (block,) = blocks("python")
    given: list[Any] = []
    code = compile(block.replace("from jebi import train_on_responses_only", ""), "docs/data.md", "exec")
    names = set(code.co_names)
    assert names == {"train_on_responses_only", "trainer"}
    from inspect import signature

    from jebi import train_on_responses_only

    parts = re.findall(r"(\w+)=", block)
    signature(train_on_responses_only).bind(given, **dict.fromkeys(parts, "x"))
