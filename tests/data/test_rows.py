"""``data.rows``: texts become token rows once, cut to length, and what would teach nothing or wrongly is refused.

The tokenizers have one token a byte, so the tests know every length.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from jebi.data.preparation import Preparation
from jebi.data.rows import Rows, _useful_workers, tokenize
from jebi.errors import ConfigError, DataError

TEXTS = ["hello</s>", "안녕하세요</s>", "a</s>"]


def rows_of(dataset: Rows, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> list[dict[str, list[int]]]:
    return list(tokenize(dataset, tokenizer, Preparation(**({"max_length": 100} | settings))))


def texts(*values: Any) -> Dataset:
    return Dataset.from_dict({"text": list(values)})


def stream(*values: str) -> IterableDataset:
    def generate() -> Iterator[dict[str, Any]]:
        yield from ({"text": value, "other": 1} for value in values)

    return IterableDataset.from_generator(generate)


def test_a_text_is_its_tokens_and_learns_all_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    for number, (row, text) in enumerate(zip(rows_of(texts(*TEXTS), tokenizer), TEXTS, strict=True)):
        assert row == {
            "input_ids": tokenizer(text)["input_ids"],
            "labels": tokenizer(text)["input_ids"],
            "row": [number],
            "lengths": [len(text.removesuffix("</s>").encode()) + 1],
        }


def test_a_stream_gives_the_same_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert rows_of(stream(*TEXTS), tokenizer) == rows_of(texts(*TEXTS), tokenizer)


def test_a_long_row_is_cut_and_says_so_in_its_length(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = rows_of(texts("abcdefgh</s>"), tokenizer, max_length=5)
    assert tokenizer.decode(row["input_ids"]) == "abcde"
    assert (row["labels"], row["lengths"]) == (row["input_ids"], [5])


def test_rows_of_one_token_are_left_out_and_the_others_keep_their_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(texts("a", "ab", "", "abc"), tokenizer)
    assert [row["row"] for row in rows] == [[1], [3]]


def test_rows_that_are_cut_or_left_out_are_told(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows_of(texts("abc", "abcdef", "abcdefgh", "a"), tokenizer, max_length=4)
    assert caplog.messages == [
        "2 of 4 rows are longer than max_seq_length=4 and were cut.",
        "1 of 4 rows have nothing to learn within max_seq_length and were left out.",
    ]
    caplog.clear()
    rows_of(texts("abc", "abcd"), tokenizer, max_length=4)
    assert caplog.messages == []


@pytest.mark.parametrize("length", [1, 2])
def test_no_row_left_is_an_error_with_a_way_out(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    with pytest.raises(DataError, match=rf"max_seq_length={length}"):
        rows_of(texts(*(["ab"] if length == 1 else ["a", ""])), tokenizer, max_length=length)


@pytest.mark.parametrize("length", [0, -1])
def test_an_impossible_length_is_refused(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    with pytest.raises(ConfigError, match=f"max_seq_length must be at least 1, not {length}"):
        rows_of(texts("ab"), tokenizer, max_length=length)


def test_a_missing_column_is_named_with_those_there_are(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"question": ["a"], "answer": ["b"]})
    with pytest.raises(DataError, match=r"dataset_text_field 'text' is no column\. There are: question, answer"):
        rows_of(dataset, tokenizer)


@pytest.mark.parametrize("dataset", [Dataset.from_dict({"text": []}), stream()])
def test_an_empty_data_set_is_refused(tokenizer: PreTrainedTokenizerFast, dataset: Rows) -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        rows_of(dataset, tokenizer)


@pytest.mark.parametrize("value", [7, None, ["a", "b"]])
def test_a_column_of_something_else_than_text_is_refused(tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    with pytest.raises(DataError, match="every row must give one text; look at dataset_text_field"):
        rows_of(texts(value, value), tokenizer)


def test_what_is_no_data_set_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"Dataset.from_list"):
        rows_of([{"text": "ab"}], tokenizer)  # type: ignore[arg-type]


QUESTIONS = {"question": ["one", "two"], "answer": ["1", "2"]}
ANSWERED = ["one=1</s>", "two=2</s>"]


def per_example(example: dict[str, Any]) -> str:
    return f"{example['question']}={example['answer']}</s>"


def per_batch(examples: dict[str, Any]) -> list[str]:
    return [f"{q}={a}</s>" for q, a in zip(examples["question"], examples["answer"], strict=True)]


def per_batch_only(examples: dict[str, Any]) -> list[str]:
    """Fails on a single example, as functions written for batches may."""
    assert isinstance(examples["question"], list)
    return per_batch(examples)


@pytest.mark.parametrize("function", [per_example, per_batch, per_batch_only])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_formatting_function_may_take_one_example_or_a_batch(
    tokenizer: PreTrainedTokenizerFast, function: Any, streamed: bool
) -> None:
    dataset: Rows = Dataset.from_dict(QUESTIONS)
    if streamed:
        dataset = dataset.to_iterable_dataset()
    rows = rows_of(dataset, tokenizer, formatting_func=function)
    assert [row["input_ids"] for row in rows] == [tokenizer(text)["input_ids"] for text in ANSWERED]


def test_a_formatting_function_wins_over_a_text_column_and_over_token_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict(QUESTIONS | {"text": ["no", "no"], "input_ids": [[1, 2], [3, 4]]})
    rows = rows_of(dataset, tokenizer, formatting_func=per_example)
    assert rows[0]["input_ids"] == tokenizer(ANSWERED[0])["input_ids"]


@pytest.mark.parametrize(
    "function",
    [
        lambda examples: {"text": ["a", "b"]},
        lambda examples: None,
        lambda examples: ["a"] * 3,
        lambda examples: [7, 8],
    ],
)
def test_a_formatting_function_that_gives_no_texts_is_refused(
    tokenizer: PreTrainedTokenizerFast, function: Any
) -> None:
    with pytest.raises(DataError, match="formatting_func"):
        rows_of(Dataset.from_dict(QUESTIONS), tokenizer, formatting_func=function)


def test_an_error_inside_a_formatting_function_is_the_users_to_see(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        rows_of(Dataset.from_dict(QUESTIONS), tokenizer, formatting_func=lambda example: example["nowhere"])


def test_bos_is_never_doubled(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    bos = bos_tokenizer.bos_token_id
    rows = rows_of(texts("abc", "<s>abc", "<s>", "x"), bos_tokenizer)
    expected = bos_tokenizer("abc")["input_ids"]
    assert expected[0] == bos
    assert [row["input_ids"] for row in rows] == [expected, expected, bos_tokenizer("x")["input_ids"]]
    assert [row["row"] for row in rows] == [[0], [1], [3]]


def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 10]], "text": ["no", "no"]})
    rows = rows_of(dataset, tokenizer, max_length=2)
    assert [(row["input_ids"], row["labels"]) for row in rows] == [([5, 6], [5, 6]), ([8, 9], [8, 9])]


def test_labels_that_are_there_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, -100, 7]]})
    assert rows_of(dataset, tokenizer)[0]["labels"] == [-100, -100, 7]


@pytest.mark.parametrize(
    ("masks", "learn", "labels"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, "auto", [-100, -100, 7, 8]),
        ({"completion_mask": [0, 0, 1, 1]}, "all", [5, 6, 7, 8]),
        ({"assistant_masks": [0, 1, 1, 0]}, "all", [-100, 6, 7, -100]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}, "answers", [-100, -100, 7, -100]),
    ],
)
def test_trls_masks_say_what_is_learnt(
    masks: dict[str, list[int]], learn: Any, labels: list[int], tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7, 8]} | masks])
    (row,) = tokenize(dataset, tokenizer, Preparation(100, learn=learn))
    assert row["labels"] == labels


def test_token_ids_without_a_mask_have_no_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7, 8]}])
    with pytest.raises(ConfigError, match="token ids do not say where their answers are: give labels"):
        tokenize(dataset, tokenizer, Preparation(100, learn="answers"))


def test_padding_that_is_there_is_taken_off(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict(
        {"input_ids": [[2, 2, 5, 6], [7, 8, 9, 2]], "attention_mask": [[0, 0, 1, 1], [1, 1, 1, 0]]}
    )
    rows = rows_of(dataset, tokenizer)
    assert [row["input_ids"] for row in rows] == [row["labels"] for row in rows] == [[5, 6], [7, 8, 9]]


def test_a_row_whose_labels_were_all_cut_away_teaches_nothing_and_is_left_out(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # The first token is no one's next token, so a label there is not learnt either.
    dataset = Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [5, 6, 7], [5, 6, 7]], "labels": [[-100, -100, 7], [-100, 6, 7], [5, -100, -100]]}
    )
    assert [row["row"] for row in rows_of(dataset, tokenizer, max_length=2)] == [[1]]


def test_labels_of_another_length_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7], [5, 6]], "labels": [[5, 6, 7], [5, 6, 7]]})
    with pytest.raises(DataError, match="row 1 has 2 input_ids and 3 labels"):
        rows_of(dataset, tokenizer)


@pytest.mark.parametrize(
    ("workers", "rows", "used"), [(None, 10**6, None), (1, 10**6, None), (2, 3999, None), (2, 4000, 2)]
)
def test_processes_are_started_where_they_pay(workers: int | None, rows: int, used: int | None) -> None:
    assert _useful_workers(workers, rows) == used
