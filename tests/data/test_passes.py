"""``data.passes``: a step's rows lie end to end, keep their boundaries, and are cut into passes that lose none."""

import random
from itertools import accumulate

import pytest
import torch

from jebi.data.known_tokens import require_known_tokens
from jebi.data.passes import Batch, Pass, collate, cut, flat_of, learnt_weight
from jebi.errors import DataError
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


def whole_rows(part: Pass) -> list[tuple[list[int], list[int]]]:
    """A pass's rows as ids and labels, put together again from the held tokens; their positions are checked."""
    held = torch.arange(part.input_ids.shape[1])
    made = []
    for begin, end in part.rows.spans():
        row = part.rows.spread(held)[begin:end]
        assert torch.equal(part.rows.positions_U[row], torch.arange(end - begin))
        made.append((part.input_ids[0, row].tolist(), part.shift_labels[0, row].tolist()))
    return made


def given_rows(batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    made = []
    for batch in batches:
        ends = list(accumulate(batch["lengths"]))
        for begin, end in zip([0, *ends], ends):
            made.append((batch["input_ids"][0, begin:end].tolist(), batch["shift_labels"][0, begin:end].tolist()))
    return made


def step(seed: int, batches: int) -> list[Batch]:
    """Batches of rows over few different ids, so that many begin alike and some are equal."""
    chance = random.Random(seed)
    made = []
    for number in range(batches):
        rows = []
        for n in range(3):
            ids = [7] * chance.randint(0, 12) + chance.choices([7, 8], k=chance.randint(2, 20))
            labels = [IGNORED if chance.random() < 0.1 else token for token in ids]
            rows.append({"input_ids": ids, "labels": labels, "lengths": [len(ids)], "row": [3 * number + n]})
        made.append(collate(rows))
    return made


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tokens", [1, 17, 64, 10**6])
@pytest.mark.parametrize("seed", range(8))
def test_a_cut_covers_every_row_once_and_whole(seed: int, tokens: int, share: bool) -> None:
    batches = step(seed, batches=4)
    passes = cut(batches, tokens, share)
    assert sorted(row for part in passes for row in whole_rows(part)) == sorted(given_rows(batches))
    for part in passes:
        held = part.input_ids.shape[1]
        assert part.shift_labels.shape == part.counts.shape == (1, held)
        assert held <= tokens or len(part.rows.spans()) == 1
        assert part.tokens == sum(len(ids) for ids, _ in whole_rows(part))
        assert share or held == part.tokens
    assert len(passes) == {1: 12, 10**6: 1}.get(tokens, len(passes))


@pytest.mark.parametrize("seed", range(8))
def test_a_shared_token_counts_once_for_every_row_and_stands_where_it_first_stood(seed: int) -> None:
    (part,) = cut(step(seed, batches=4), 10**6)
    held = torch.arange(part.input_ids.shape[1])
    whole = part.rows.spread(held)
    assert torch.equal(part.counts[0], torch.bincount(whole).float())
    assert torch.equal(part.rows.gather(whole), held)
    assert int(part.counts.sum()) == part.tokens > len(held)


def test_rows_share_what_is_equal_from_the_beginning_on() -> None:
    common, rest = list(range(10, 20)), list(range(30, 35))
    rows = [[*common, *rest], [*common, 99, *rest], [5, *common]]
    (part,) = cut(
        [collate([example(0, [len(r)], [n]) | {"input_ids": r, "labels": r} for n, r in enumerate(rows)])], 100
    )
    # The last common token is followed by another one in each row, so its label differs and it is held twice.
    assert part.input_ids.shape[1] == part.tokens - (len(common) - 1)


def test_what_is_learnt_there_has_to_be_equal_too() -> None:
    ids = list(range(10, 20))
    asked = {"input_ids": ids, "labels": [IGNORED] * 5 + ids[5:], "lengths": [10], "row": [0]}
    whole = {"input_ids": ids, "labels": ids, "lengths": [10], "row": [1]}
    (part,) = cut([collate([asked, whole])], 100)
    assert part.input_ids.shape[1] == 20, "the first label differs already"
    (part,) = cut([collate([whole, whole])], 100)
    assert part.input_ids.shape[1] == 10, "equal rows are one row that counts twice"
    assert part.counts.tolist() == [[2.0] * 10]


def test_the_cut_depends_on_rows_and_not_on_how_they_were_batched() -> None:
    rows = [example(100 * (n % 3), [5 + n], [n]) for n in range(8)]
    one = cut([collate(rows)], 30)
    eight = cut([collate([row]) for row in reversed(rows)], 30)
    assert len(one) == len(eight) > 1
    for left, right in zip(one, eight):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.shift_labels, right.shift_labels)
        assert torch.equal(left.counts, right.counts)
        assert left.rows.starts == right.rows.starts


def test_packed_sequences_are_cut_at_the_rows_inside_them() -> None:
    passes = cut([collate([example(0, [4, 3], [0, 1]), example(50, [5], [2])])], 5)
    assert sorted(part.input_ids.shape[1] for part in passes) == [3, 4, 5]


def test_whole_rows_are_bounded_too_since_attention_keeps_them() -> None:
    common = list(range(100, 190))
    rows = [
        {"input_ids": [*common, n], "labels": [*common, n], "lengths": [len(common) + 1], "row": [n]} for n in range(8)
    ]
    passes = cut([collate(rows)], 110)
    assert all(part.tokens <= 2 * 110 for part in passes)
    assert len(passes) == 4, "two rows of 91 tokens fit twice the limit of 110"


def test_weights_of_rows_that_share_tokens_are_summed() -> None:
    """A token's loss is the same in every row that shares it, so the rows' weights for it add up."""
    ids = list(range(10, 16))
    rows = [
        {"input_ids": [*ids, n], "labels": [*ids, n], "lengths": [7], "row": [n], "weights": [weight] * 7}
        for n, weight in ((1, 0.5), (2, 2.0))
    ]
    (part,) = cut([collate(rows)], 100)
    assert part.input_ids.tolist() == [[*ids[:5], ids[5], 1, ids[5], 2]]
    assert part.counts.tolist() == [[2.5] * 5 + [0.5, 0.0, 2.0, 0.0]]


def test_a_weight_moves_with_its_label_and_rows_without_weights_count_once() -> None:
    weighed = example(10, [3], [0]) | {"weights": [9.0, 0.5, 2.0]}
    batch = collate([weighed, example(20, [2], [1])])
    assert batch["shift_labels"].tolist() == [[11, 12, IGNORED, 21, IGNORED]]
    assert batch["shift_weights"].tolist() == [[0.5, 2.0, 0.0, 1.0, 0.0]]
    assert learnt_weight(batch).item() == 3.5
    assert learnt_weight(collate([example(10, [3], [0])])).item() == 2
    (part,) = cut([batch], 100, share=False)
    learnt = part.shift_labels != IGNORED
    assert part.counts[learnt].sum().item() == 3.5


def test_a_row_with_a_token_that_the_model_does_not_have_is_named() -> None:
    first, last = (flat_of(collate([example(start, [3, 2], rows)])) for start, rows in ((10, [7, 8]), (20, [2, 4])))
    for rows in (first, last):
        require_known_tokens(rows, 25)
    require_known_tokens(first, 23)
    with pytest.raises(DataError, match=r"^row 4 has the token 23, but the model's are 0 to 22"):
        require_known_tokens(last, 23)
    labelled = example(10, [3], [5]) | {"labels": [IGNORED, 40, -1]}
    with pytest.raises(DataError, match=r"^row 5 has the token 40"):
        require_known_tokens(flat_of(collate([labelled])), 23)
