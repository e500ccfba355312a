"""``data.mixing`` and ``data.loading``: several sources come as often as weights say, in an order a seed fixes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import PreTrainedTokenizerFast

from jebi.data import loading
from jebi.data.mixing import Source, read_sources
from jebi.data.preparation import Preparation
from jebi.errors import ConfigError, DataError

HOW = Preparation(100, text_field=None)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """Ten rows of prompts with weights, and six of messages."""
    talk = [{"role": "user", "content": "q"}]
    return (
        write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": f"{n}", "weight": 1 + n} for n in range(10)]),
        write(
            tmp_path / "b.jsonl", [{"messages": [*talk, {"role": "assistant", "content": f"{n}"}]} for n in range(6)]
        ),
    )


def mixed(given: Any, tokenizer: PreTrainedTokenizerFast, seed: int = 1, streaming: bool = False) -> list[Any]:
    parts = loading.read(read_sources(given, "data.train"), "train", streaming)
    how = Preparation(100, text_field=None, template="{instruction}={output}")
    return list(loading.prepare(parts, tokenizer, how, seed, buffer=4))


def test_sources_come_as_often_as_their_weights_say(
    sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = mixed([{"source": sources[0], "weight": 2.5}, {"source": sources[1], "weight": 0.5}], tokenizer)
    counts = Counter(row["row"][0] for row in rows)
    assert sorted(counts[n] for n in range(10)) == [2] * 5 + [3] * 5
    assert sum(counts[n] for n in range(10, 16)) == 3
    assert max(counts[n] for n in range(10, 16)) == 1, "row numbers go on through the sources"


def test_of_no_source_nothing_is_left(sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = mixed([{"source": sources[0], "weight": 0.01}, {"source": sources[1], "weight": 0.01}], tokenizer)
    assert sorted(row["row"][0] >= 10 for row in rows) == [False, True]


def test_the_seed_fixes_the_order(sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    assert mixed(list(sources), tokenizer, 1) == mixed(list(sources), tokenizer, 1)
    assert mixed(list(sources), tokenizer, 1) != mixed(list(sources), tokenizer, 2)
    numbers = [row["row"][0] for row in mixed(list(sources), tokenizer)]
    assert sorted(numbers) == list(range(16))
    assert numbers != sorted(numbers)


def test_one_source_stays_as_it_is(sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    assert [row["row"][0] for row in mixed(sources[0], tokenizer)] == list(range(10))


def test_rows_of_a_source_without_weights_count_once(
    sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = mixed(list(sources), tokenizer)
    assert {row["row"][0]: max(row["weights"]) for row in rows} == {n: 1.0 + n if n < 10 else 1.0 for n in range(16)}


def test_streams_are_drawn_by_weight_until_all_have_ended(
    sources: tuple[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    given = [{"source": sources[0], "weight": 3}, sources[1]]
    rows = mixed(given, tokenizer, streaming=True)
    assert sorted(len(row["input_ids"]) for row in rows) == [4] * 16
    assert rows == mixed(given, tokenizer, streaming=True)


def test_a_stream_is_read_row_by_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of 5,000 rows the ones that are asked for are read, and as many as are tokenised together."""
    content = [{"prompt": "a", "completion": f"{n}"} for n in range(3000)]
    path = write(tmp_path / "long.jsonl", content)
    with open(path, "a", encoding="utf-8") as file:
        file.write("{broken\n")
    (part,) = loading.read([Source(path)], "train", streaming=True)
    stream = loading.prepare([part], tokenizer, HOW, 1)
    assert isinstance(stream, IterableDataset)
    first = next(iter(stream))
    assert tokenizer.decode(first["input_ids"]) == "a0</s>"
    with pytest.raises(DataError, match=r"long.jsonl' line 3001: invalid JSON"):
        list(stream)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "data.train is an empty list"),
        ([3], r"data.train must be a file, .*\{source: a.jsonl, weight: 2\}; not 3"),
        ([{"weight": 2}], "data.train must be a file"),
        ([{"source": "a.jsonl", "weight": 0}], r"data.train: the weight of 'a.jsonl' must be a number above 0, not 0"),
        ([{"source": "a.jsonl", "weight": "2"}], "must be a number above 0, not '2'"),
        ([{"source": "a.jsonl", "share": 2}], "data.train must be a file"),
        ([{"source": "a.jsonl", "split": 2}], "data.train: the split of 'a.jsonl' must be a name, not 2"),
    ],
)
def test_what_is_no_list_of_sources_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sources(given, "data.train")


def test_a_column_that_a_stream_brings_up_later_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Else a weight would be lost, since the first row says what columns there are."""
    content: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"} for _ in range(3)]
    for late in (content[0] | {"weight": 0.5}, content[0] | {"weight": 0}):
        path = write(tmp_path / "late.jsonl", [*content, late])
        with pytest.raises(DataError, match="column 'weight' comes up in rows 0 to 3 of the stream, but its first row"):
            mixed(path, tokenizer, streaming=True)
    path = write(tmp_path / "early.jsonl", [content[0] | {"weight": None}, late])
    assert [row["row"][0] for row in mixed(path, tokenizer, streaming=True)] == [0]


def test_a_share_is_held_out_of_every_source_the_same_way_every_time(sources: tuple[str, str]) -> None:
    parts = loading.read([Source(sources[0], 2.0), Source(sources[1])], "train")
    (rest, apart), (_, again) = loading.hold_out(parts, 0.3), loading.hold_out(parts, 0.3)
    assert [len(rows) for _, rows in rest] == [7, 4]
    assert [len(rows) for _, rows in apart] == [3, 2]
    assert [rows.to_list() for _, rows in apart] == [rows.to_list() for _, rows in again]
    assert [source.weight for source, _ in apart] == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"data.heldout_share=0.99 of 10 rows leaves none"):
        loading.hold_out(parts, 0.99)


def test_sources_of_different_templates_need_one_named(tmp_path: Path, sources: tuple[str, str]) -> None:
    parts = loading.read([Source(name) for name in sources], "train")
    with pytest.raises(
        ConfigError, match=r"different templates \('.*a.jsonl' bare, '.*b.jsonl' chat\): set data.templ"
    ):
        loading.template_of_all(parts, HOW)
    assert loading.template_of_all(parts, Preparation(100, text_field=None, template="chat")) == "chat"


def test_a_fault_names_the_source(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.jsonl", [{"conversations": [{"from": "human", "value": "a"}]}, {"conversations": []}])
    parts = loading.read([Source(path)], "train")
    with pytest.raises(DataError, match=r"'.*odd.jsonl': row 1 \(counted from 0\): the conversation is empty"):
        loading.require_readable(parts, HOW)
    loading.require_readable(parts, Preparation(100, text_field=None, skip_bad_rows=True))
