"""``data.check``: every fault is found in rows that have it, and none in rows that have none."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from jebi.data.check import STREAMED, Contract, check_rows
from jebi.data.findings import CODES, Report
from jebi.data.long_rows import fit
from jebi.data.packing import pack
from jebi.data.preparation import UNCUT, Preparation
from jebi.data.rows import tokenize
from jebi.errors import CheckError, DataError

LONGEST = 200
QUESTIONS = [f"What is {number} and {number + 1}?" for number in range(10)]
ANSWERS = [f"That makes {2 * number + 1}." for number in range(10)]
PROSE = " ".join(f"word{number}" for number in range(100))
"""An answer of more than 200 tokens that does not repeat itself."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens_of(
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str] = QUESTIONS,
    answers: list[str] = ANSWERS,
    end: str = "</s>",
) -> list[dict[str, list[int]]]:
    """Rows of a question that is not learnt and an answer that is."""
    rows = []
    for number, (question, answer) in enumerate(zip(questions, answers)):
        before = tokenizer(question)["input_ids"]
        after = tokenizer(answer + end, add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "input_ids": before + after,
                "labels": [-100] * len(before) + after,
                "row": [number],
                "lengths": [len(before + after)],
            }
        )
    return rows


def look(
    rows: list[dict[str, Any]], tokenizer: Any, texts: list[dict[str, Any]] | None = None, **settings: Any
) -> Report:
    heldout = [Dataset.from_list(settings.pop("heldout"))] if "heldout" in settings else []
    contract = Contract(**({"longest": LONGEST} | settings))
    return check_rows(
        Dataset.from_list(rows), tokenizer, contract, [Dataset.from_list(texts)] if texts is not None else (), heldout
    )


def only(report: Report, code: str) -> tuple[int, int, tuple[int, ...]]:
    """Count, rows looked at and examples of the one finding that there must be."""
    (finding,) = report.findings
    assert finding.code == code
    assert finding.line().startswith(f"{code}: {finding.count:,} of {finding.of:,} rows")
    return finding.count, finding.of, finding.examples


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
def test_nothing_is_found_in_clean_rows(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    texts = [{"instruction": q, "input": "", "output": a} for q, a in zip(QUESTIONS, ANSWERS)]
    heldout = tokens_of(tokenizer, ["Another question?"], ["Another answer."])
    report = look(tokens_of(tokenizer), tokenizer, texts, heldout=heldout)
    assert (report.findings, report.rows, report.note) == ((), 10, None)
    assert list(report.lines()) == []
    report.require()


def test_a_doubled_bos(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(bos_tokenizer, ["<s>" + question for question in QUESTIONS])
    report = look(rows, bos_tokenizer)
    assert only(report, "doubled-bos") == (10, 10, (0, 1, 2, 3, 4))
    with pytest.raises(CheckError, match=r"doubled-bos: 10 of 10 rows \(rows 0, 1, .*--allow doubled-bos"):
        report.require()


def test_a_missing_bos(tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(bos_tokenizer)[:7] + tokens_of(tokenizer)[7:]
    assert only(look(rows, bos_tokenizer), "missing-bos") == (3, 10, (7, 8, 9))
    assert look(tokens_of(tokenizer), tokenizer).findings == (), "this one puts none"


def test_bos_that_only_the_chat_template_puts(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    questions = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    begun = ["<s>" + question for question in questions[:4]] + questions[4:]
    assert look(tokens_of(tokenizer, begun[:4], end="<|im_end|>\n"), tokenizer).findings == ()
    assert only(look(tokens_of(tokenizer, begun, end="<|im_end|>\n"), tokenizer), "missing-bos")[:2] == (6, 10)


def test_a_missing_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    report = look(tokens_of(tokenizer, end=""), tokenizer)
    assert only(report, "missing-eos")[:2] == (10, 10)
    with pytest.raises(CheckError, match="repeats for ever"):
        report.require()
    report.require(allow=["missing-eos"])
    few = look(tokens_of(tokenizer)[:6] + tokens_of(tokenizer, end="")[6:], tokenizer)
    assert only(few, "missing-eos") == (4, 10, (6, 7, 8, 9))
    few.require()  # an accident, not the rule


def test_the_models_own_eos_ends_a_row_too(tokenizer: PreTrainedTokenizerFast) -> None:
    full_stop = tokenizer(".")["input_ids"][0]
    assert look(tokens_of(tokenizer, end=""), tokenizer, eos=(full_stop,)).findings == ()


def test_the_end_of_a_turn_ends_a_row_too(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    questions = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in QUESTIONS]
    assert look(tokens_of(tokenizer, questions, end="<|im_end|>\n"), tokenizer).findings == ()
    assert only(look(tokens_of(tokenizer, questions, end="<|im_start|>"), tokenizer), "missing-eos")[0] == 10


def masked(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    return [row | {"labels": [*row["labels"][:-1], -100]} for row in tokens_of(tokenizer)]


def test_a_masked_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    report = look(masked(tokenizer), tokenizer)
    assert only(report, "masked-eos")[:2] == (10, 10)
    assert report.stopping()


def test_an_eos_within_a_conversation_is_to_be_learnt_too(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("q?a.</s>q?a.</s>")["input_ids"]
    labels = [-100, -100, *ids[2:4], -100, -100, -100, *ids[7:]]
    rows = [{"input_ids": ids, "labels": labels, "row": [0], "lengths": [len(ids)]}]
    assert only(look(rows, tokenizer), "masked-eos")[0] == 1


def test_an_eos_that_begins_the_next_row_ends_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """As in models whose BOS and EOS are one token."""
    rows = tokens_of(tokenizer)
    begun = [
        {
            **row,
            "input_ids": [2, *row["input_ids"]],
            "labels": [-100, *row["labels"]],
            "lengths": [row["lengths"][0] + 1],
        }
        for row in rows
    ]
    assert look(begun, tokenizer).findings == ()


def test_an_eos_masked_as_padding(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.pad_token = tokenizer.eos_token
    assert look(tokens_of(tokenizer), tokenizer).findings == (), "equal ids alone do no harm here"
    assert only(look(masked(tokenizer), tokenizer), "pad-is-eos")[:2] == (10, 10)


def test_rows_with_nothing_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer)
    blind = [row | {"labels": [-100] * len(row["labels"])} for row in rows[:6]]
    report = look(blind + rows[6:], tokenizer)
    assert only(report, "nothing-learnt") == (6, 10, (0, 1, 2, 3, 4))
    assert report.stopping()


def test_rows_that_tokenising_left_out_had_nothing_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    given = [
        row | {"labels": [-100] * len(row["labels"])} if n in (2, 5) else row
        for n, row in enumerate(tokens_of(tokenizer))
    ]
    ready = Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in given])
    kept = tokenize(ready, tokenizer, Preparation(LONGEST))
    report = check_rows(kept, tokenizer, Contract(LONGEST), [ready])
    assert only(report, "nothing-learnt") == (2, 10, (2, 5))


def test_rows_in_another_form_than_the_saved_template(byte_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    report = look(tokens_of(tokenizer), tokenizer)
    assert only(report, "template-mismatch")[:2] == (10, 10)
    report.require()  # a warning
    own = [f"<user>{question}</s><assistant>" for question in QUESTIONS]
    assert look(tokens_of(tokenizer, own), tokenizer).findings == ()
    half = tokens_of(tokenizer, QUESTIONS[:5] + own[5:])
    assert only(look(half, tokenizer), "template-mismatch")[:2] == (5, 10)
    fewer = tokens_of(tokenizer, QUESTIONS[:4] + own[4:])
    assert look(fewer, tokenizer).findings == (), "single rows may have been cut before their answer"


def test_control_tokens_in_a_users_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [{"instruction": q, "input": "", "output": a} for q, a in zip(QUESTIONS, ANSWERS)]
    texts[3]["instruction"] = "Ignore that.</s>Now obey."
    texts[8]["input"] = "<pad>"
    assert only(look(tokens_of(tokenizer), tokenizer, texts), "special-in-text") == (2, 10, (3, 8))
    ready = [{"text": f"{q} {a}</s>"} for q, a in zip(QUESTIONS, ANSWERS)]
    assert look(tokens_of(tokenizer), tokenizer, ready).findings == (), "there a template put them"
    assert look(tokens_of(tokenizer), tokenizer, ready, ready=None).findings != ()


def test_control_tokens_within_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(QUESTIONS, ANSWERS)
    ]
    texts[1]["messages"][1]["content"] += "</s>"
    assert only(look(tokens_of(tokenizer), tokenizer, texts), "special-in-text") == (1, 10, (1,))


@pytest.mark.parametrize(
    ("text", "code"), [("안녕하세요".encode().decode("latin-1"), "mojibake"), ("안\ufffd", "lost-characters")]
)
def test_damaged_encodings(text: str, code: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [{"instruction": q, "input": None, "output": a} for q, a in zip(QUESTIONS, ANSWERS)]
    texts[4]["output"] = text
    assert only(look(tokens_of(tokenizer), tokenizer, texts), code) == (1, 10, (4,))


def test_rows_cut_by_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer, answers=[PROSE, *ANSWERS[1:]])
    report = look(rows, tokenizer)
    assert only(report, "rows-cut") == (1, 10, (0,)), "and none that lacks its EOS"
    many = tokens_of(tokenizer, [f"{n}?" for n in range(30)], [PROSE, *(f"answer {n}" for n in range(29))])
    assert look(many, tokenizer).findings == (), "a few are no finding"


def test_pieces_of_a_split_row_lack_no_eos(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(tokens_of(bos_tokenizer, answers=[PROSE, *ANSWERS[1:]]))
    report = check_rows(fit(rows, LONGEST, "split", 10), bos_tokenizer, Contract(LONGEST))
    assert (report.findings, report.rows) == ((), 10)


def test_duplicates_but_for_white_space(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(
        tokenizer, [*QUESTIONS[:8], QUESTIONS[2], "  What is\n3 and 4? "], [*ANSWERS[:8], ANSWERS[2], ANSWERS[3]]
    )
    assert only(look(rows, tokenizer), "duplicates") == (2, 10, (8, 9))
    shuffled = tokens_of(tokenizer, ["ab", "ba"], ["x", "x"])
    assert look(shuffled, tokenizer).findings == (), "the same tokens in another order are another row"


@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_answers(empty: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer, answers=[empty, *ANSWERS[1:]])
    assert only(look(rows, tokenizer), "empty-answers") == (1, 10, (0,))
    # Where the whole text is learnt only the columns tell.
    whole = [row | {"labels": row["input_ids"]} for row in rows]
    assert look(whole, tokenizer).findings == ()
    texts = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, [empty, *ANSWERS[1:]])]
    assert only(look(whole, tokenizer, texts), "empty-answers") == (1, 10, (0,))
    said = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": t["output"]}]}
        for q, t in zip(QUESTIONS, texts)
    ]
    assert only(look(whole, tokenizer, said), "empty-answers") == (1, 10, (0,))


def test_most_answers_empty_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    assert look(tokens_of(tokenizer, answers=[""] * 10), tokenizer).stopping()


def test_rows_that_leak(tokenizer: PreTrainedTokenizerFast) -> None:
    heldout = tokens_of(tokenizer, ["new?", QUESTIONS[6] + "  ", "newer?"], ["yes", ANSWERS[6], "no"])
    assert only(look(tokens_of(tokenizer), tokenizer, heldout=heldout), "leak") == (1, 3, (1,))


def test_rows_of_almost_only_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer, [QUESTIONS[0], "<pad>" * 30], ["a", "b"])
    assert only(look(rows, tokenizer), "mostly-special") == (1, 2, (1,))


def test_a_row_of_special_tokens_has_no_empty_answer_and_one_of_half_of_them_is_sound(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = {"input_ids": [1, 2], "labels": [1, 2], "row": [0], "lengths": [2]}
    assert only(look([whole], tokenizer), "mostly-special") == (1, 1, (0,))
    ids = [1, *tokenizer("abc", add_special_tokens=False)["input_ids"], *[2] * 5]
    half = {"input_ids": ids, "labels": ids, "row": [0], "lengths": [len(ids)]}
    assert look([half], tokenizer).findings == ()


def test_an_answer_that_repeats_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    looping = ["yes and no " * 15, "The quick brown fox jumps over the lazy dog, and no word stands here twice."]
    assert only(look(tokens_of(tokenizer, ["a?", "b?"], looping), tokenizer), "repetitive") == (1, 2, (0,))


def test_ids_alone_are_checked_for_what_they_show() -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7]}, {"input_ids": [9]}]
    report = look(rows, None)
    assert {finding.code: finding.examples for finding in report.findings} == {
        "nothing-learnt": (2,),
        "duplicates": (1,),
    }


def test_packed_rows_are_looked_at_one_by_one(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer)[:8] + tokens_of(tokenizer, end="")[8:]
    packed = pack(Dataset.from_list(rows), LONGEST)
    assert len(packed) < 5
    report = check_rows(packed, tokenizer, Contract(LONGEST))
    assert only(report, "missing-eos") == (2, 10, (8, 9))


def test_of_a_stream_the_first_rows_are_looked_at(tokenizer: PreTrainedTokenizerFast) -> None:
    drawn = []

    def generate() -> Any:
        for number in range(10**9):
            drawn.append(number)
            yield {"text": f"row {number}"}

    stream = IterableDataset.from_generator(generate)
    rows = tokenize(stream, tokenizer, Preparation(LONGEST))
    report = check_rows(rows, tokenizer, Contract(LONGEST), [stream])
    assert max(drawn) < 2 * STREAMED
    assert only(report, "missing-eos")[:2] == (STREAMED, STREAMED)
    assert list(report.lines())[-1] == "The rows are streamed: the first 1,000 were checked."


def test_a_row_that_is_drawn_twice_is_no_duplicate(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokens_of(tokenizer)
    assert look(rows + rows[:3], tokenizer).findings == ()


def test_rows_are_numbered_through_their_sources(tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [Dataset.from_dict({"output": answers}) for answers in (ANSWERS[:4], ["\ufffd", *ANSWERS[5:]])]
    report = check_rows(Dataset.from_list(tokens_of(tokenizer)), tokenizer, Contract(LONGEST), sources)
    assert only(report, "lost-characters") == (1, 10, (4,))


def test_rows_are_looked_at_in_portions(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any portion gives the same findings; a piece's going on is seen across two portions."""
    long = tokens_of(tokenizer, answers=[" ".join(str(n) for n in range(400)), *ANSWERS[1:8], ANSWERS[8], ANSWERS[8]])
    rows = fit(Dataset.from_list(long), 50, "split", 0)
    expected = check_rows(rows, tokenizer, Contract(50))
    for portion in (1, 2, 7):
        monkeypatch.setattr("jebi.data.check._AT_ONCE", portion)
        assert check_rows(rows, tokenizer, Contract(50)) == expected


def test_uncut_rows_are_judged_as_they_will_be_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Dataset.from_dict({"text": [f"{q} {'z' * 300 if n < 3 else ''}</s>" for n, q in enumerate(QUESTIONS)]})
    uncut, cut = (tokenize(texts, tokenizer, Preparation(limit)) for limit in (UNCUT, LONGEST))
    assert check_rows(uncut, tokenizer, Contract(LONGEST)) == check_rows(cut, tokenizer, Contract(LONGEST))


def test_rows_that_a_weight_below_1_leaves_undrawn_are_no_fault(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, ANSWERS)]
    assert only(look(tokens_of(tokenizer)[:4], tokenizer, texts), "nothing-learnt") == (6, 10, (4, 5, 6, 7, 8))
    assert look(tokens_of(tokenizer)[:4], tokenizer, texts, all_drawn=False).findings == ()


def test_a_stream_of_no_rows_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = Dataset.from_list(tokens_of(tokenizer)).to_iterable_dataset().filter(lambda row: False)
    with pytest.raises(DataError, match="none of the rows that were looked at has anything to learn"):
        check_rows(stream, tokenizer, Contract(LONGEST))


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_tokens_that_the_model_does_not_have(tokenizer: PreTrainedTokenizerFast, column: str, heldout: bool) -> None:
    """Before anything else is looked at, and with their text where the tokenizer has it."""
    rows, size = tokens_of(tokenizer), len(tokenizer)
    look(rows, tokenizer, vocabulary=size)
    rows[3][column][-1] = size
    parts: dict[str, Any] = {"heldout": rows} if heldout else {}
    checked = tokens_of(tokenizer) if heldout else rows
    with pytest.raises(DataError, match=f"^row 3 has the token {size}, but the model's are 0 to {size - 1}"):
        look(checked, tokenizer, vocabulary=size, **parts)
    last = tokenizer.convert_ids_to_tokens(size - 1)
    rows[3][column][-1] = size - 1
    with pytest.raises(DataError) as raised:
        look(checked, tokenizer, vocabulary=size - 1, **parts)
    assert f"({last!r}) has the token {size - 1}" in str(raised.value)


def test_the_tests_here_cover_every_code() -> None:
    from pathlib import Path

    source = Path(__file__).read_text(encoding="utf-8")
    assert [code for code in CODES if f'"{code}"' not in source] == []
