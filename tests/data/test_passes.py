"""``data.passes``: a step's rows lie end to end, keep their boundaries, and are cut into passes that lose none."""

import random

import pytest
import torch

from jebi.data.passes import Batch, collate, cut
from jebi.models.unpadding import IGNORED


def example(start: int, lengths: list[int], rows: list[int]) -> dict[str, list[int]]:
    ids = list(range(start, start + sum(lengths)))
    return {"input_ids": ids, "labels": list(ids), "lengths": lengths, "row": rows}


def test_a_batch_lies_end_to_end_without_padding() -> None:
    batch = collate([example(10, [3], [7]), example(20, [2], [4])])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21]]
    assert batch["labels"].tolist() == [[10, 11, 12, 20, 21]]
    assert (batch["lengths"], batch["rows"]) == ([3, 2], [7, 4])


def test_the_label_of_a_token_is_the_next_one_and_never_the_next_rows() -> None:
    batch = collate([example(10, [3, 1], [0, 1]), example(20, [2], [2])])
    assert batch["shift_labels"].tolist() == [[11, 12, IGNORED, IGNORED, 21, IGNORED]]


def test_ignored_labels_stay_ignored() -> None:
    row = example(10, [4], [0]) | {"labels": [IGNORED, IGNORED, 12, 13]}
    assert collate([row])["shift_labels"].tolist() == [[IGNORED, 12, 13, IGNORED]]


def test_every_token_counts_as_real() -> None:
    """Trainer's ``include_num_input_tokens_seen="non_padding"`` asks the mask; a padding token may equal EOS here."""
    batch = collate([example(10, [3], [0])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1]]


def step(seed: int, batches: int) -> list[Batch]:
    chance = random.Random(seed)
    made = []
    for number in range(batches):
        parts = [example(1000 * number + 100 * n, [chance.randint(1, 40)], [10 * number + n]) for n in range(3)]
        made.append(collate(parts))
    return made


@pytest.mark.parametrize("tokens", [1, 17, 64, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_a_cut_covers_every_row_once_and_whole(seed: int, tokens: int) -> None:
    batches = step(seed, batches=4)
    expected: dict[tuple[int, ...], list[int]] = {}
    for batch in batches:
        at = 0
        for length in batch["lengths"]:
            expected[tuple(batch["input_ids"][0, at : at + length].tolist())] = batch["shift_labels"][
                0, at : at + length
            ].tolist()
            at += length
    found: dict[tuple[int, ...], list[int]] = {}
    passes = cut(batches, tokens)
    for part in passes:
        assert part.input_ids.shape == part.shift_labels.shape == (1, part.rows.starts[-1])
        assert part.input_ids.shape[1] <= tokens or len(part.rows.spans()) == 1
        for begin, end in part.rows.spans():
            found[tuple(part.input_ids[0, begin:end].tolist())] = part.shift_labels[0, begin:end].tolist()
            assert torch.equal(part.rows.positions_T[begin:end], torch.arange(end - begin))
    assert found == expected
    assert len(passes) == (12 if tokens == 1 else 1 if tokens == 10**6 else len(passes))


def test_the_cut_depends_on_rows_and_not_on_how_they_were_batched() -> None:
    rows = [example(100 * n, [5 + n], [n]) for n in range(8)]
    one = cut([collate(rows)], 30)
    eight = cut([collate([row]) for row in rows], 30)
    assert len(one) == len(eight) > 1
    for left, right in zip(one, eight):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.shift_labels, right.shift_labels)
        assert left.rows.starts == right.rows.starts


def test_packed_sequences_are_cut_at_the_rows_inside_them() -> None:
    passes = cut([collate([example(0, [4, 3], [0, 1]), example(50, [5], [2])])], 5)
    assert sorted(part.input_ids.shape[1] for part in passes) == [3, 4, 5]
