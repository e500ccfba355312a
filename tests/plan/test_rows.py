"""``plan.rows``: estimates beside real tokenizers."""

import csv
import json
from pathlib import Path

import pytest
from datasets import Dataset

from jebi.config import read_run
from jebi.errors import DataError
from jebi.models.files import find
from jebi.plan.rows import estimate
from jebi.run import arguments, read, token_rows

ROWS = Path(__file__).resolve().parents[2] / "examples" / "data" / "train.jsonl"


def test_the_demos_rows_are_about_as_long_as_they_are() -> None:
    """Within 10 %, Korean in a small vocabulary included."""
    run = read_run(ROWS.parents[1] / "demo.yaml", [f"data.train={ROWS}"])
    tokenizer = find("smollm2").tokenizer()
    tokens = token_rows(*read(run.data), run, arguments(run), tokenizer, 1024).train
    assert isinstance(tokens, Dataset)
    lengths = [len(row["input_ids"]) for row in tokens]
    found = estimate(ROWS, 1024, len(tokenizer))
    assert found.rows == len(lengths)
    assert found.mean == pytest.approx(sum(lengths) / len(lengths), rel=0.1)


def test_forms_of_files(tmp_path: Path) -> None:
    rows = [{"text": "word " * count} for count in (10, 100, 1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"data": rows}))
    with (tmp_path / "d.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    found = [estimate(tmp_path / name, 500, 128256) for name in ("a.jsonl", "b.json", "c.json", "d.csv")]
    assert all(one == found[0] for one in found)
    assert found[0].rows == 3
    assert found[0].longest > 1000
    assert found[0].mean < 500


def test_a_byte_order_mark_and_fields_beside_the_rows_are_passed_over(tmp_path: Path) -> None:
    row = {"instruction": "안녕하세요", "output": "네"}
    plain, marked, beside = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.json"
    plain.write_text(json.dumps(row), encoding="utf-8")
    marked.write_text(json.dumps(row), encoding="utf-8-sig")
    beside.write_text(json.dumps({"version": "1.0", "data": [row]}), encoding="utf-8")
    assert estimate(plain, 500, 128256) == estimate(marked, 500, 128256) == estimate(beside, 500, 128256)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.parquet", ""), ("a.jsonl", ""), ("a.jsonl", "{"), ("b.jsonl", None), ("a.json", "{}"), ("a.json", "3"),
        ("a.json", "[" * 100_000), ("a.json", "{}\n{}"), ("a.csv", f"a\n{'x' * 200_000}\n"),
    ],
    ids=lambda value: str(value)[:9],
)  # fmt: skip
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="--rows"):
        estimate(tmp_path / name, 500, 128256)
