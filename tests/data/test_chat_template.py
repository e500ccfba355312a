"""``data.chat_template``: rows are rendered as transformers renders them, and answers found where TRL finds them.

TRL needs templates with ``{% generation %}`` markers; it ships such ones, and the markers change no text. Two
differences are meant: TRL also learns the line break behind the end-of-turn token, and a token that straddles an
answer's beginning.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.data_utils import common_prefix_length

from jebi.data.chat_template import ChatTemplate
from jebi.data.conversation import Conversation, Turn
from jebi.data.encoding import Encoder, Tokens, Written
from jebi.data.formats import format_named, read_row, recognise
from jebi.data.sources import load_rows
from jebi.data.templates import TextTemplate
from jebi.errors import ConfigError, DataError
from jebi.models.unpadding import IGNORED

Real = Callable[[str], PreTrainedTokenizerBase]

END = {"smollm2": "<|im_end|>", "llama3_1": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TRAINING = {"llama3_1": "llama3", "qwen3": "qwen3", "gemma3": "gemma3"}


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(role, content) for role, content in turns))  # type: ignore[arg-type]


def learnt(tokenizer: PreTrainedTokenizerBase, template: Any, row: Conversation, turns: tuple[int, ...]) -> Tokens:
    rendered = template.render(row, turns)
    spans = tuple((answer.start, answer.end, 1.0) for answer in rendered.answers)
    (tokens,) = Encoder(tokenizer, template.literals).encode([Written(rendered.text, False, template.whole, spans)])
    return tokens


def texts_of(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[str]:
    """What each run of learnt tokens spells."""
    runs: list[list[int]] = [[]]
    for label in tokens.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [str(tokenizer.decode(run)) for run in runs if run]


def rows_of(folder: Path, name: str) -> list[Conversation]:
    rows = load_rows(str(folder / name))
    form = format_named("messages", rows.column_names) if "kto" in name else recognise(rows.column_names)
    return [read_row(form, row, number, {}) for number, row in enumerate(rows)]


def applied(tokenizer: PreTrainedTokenizerBase, row: Conversation, **settings: Any) -> list[int]:
    messages = [turn.message() for turn in row.turns]
    return tokenizer.apply_chat_template(messages, tools=list(row.tools) or None, return_dict=False, **settings)


@pytest.mark.parametrize("name", END)
def test_real_rows_are_rendered_as_transformers_renders_them(name: str, real_tokenizer: Real, real_rows: Path) -> None:
    tokenizer = real_tokenizer(name)
    template = ChatTemplate(tokenizer)
    encoder = Encoder(tokenizer, template.literals)
    rows = [row for file in ("alpaca_en_demo.json", "alpaca_zh_demo.json") for row in rows_of(real_rows, file)[::2]]
    rows += rows_of(real_rows, "kto_en_demo.json")
    if name == "qwen3":
        rows += rows_of(real_rows, "glaive_toolcall_zh_demo.json")
        rows += rows_of(real_rows, "reason_tool_use_demo_50.jsonl")
    hidden = [encoder.special.hide(row) for row in rows]
    assert [number for number, row in enumerate(hidden) if row is not rows[number]] == [], "no special tokens in them"
    made = encoder.encode([Written(template.render(row).text, False, True) for row in rows])
    assert len(rows) >= 1299
    for row, tokens in zip(rows, made):
        assert tokens.ids == applied(tokenizer, row)


@pytest.mark.parametrize("name", TRAINING)
def test_masks_are_trls(name: str, real_tokenizer: Real, real_rows: Path) -> None:
    tokenizer = real_tokenizer(name)
    jinja = (TRL_TEMPLATES / f"{TRAINING[name]}_training.jinja").read_text()
    template = ChatTemplate(tokenizer, jinja)
    line_breaks = {tokenizer("\n", add_special_tokens=False)["input_ids"][-1]}
    end = tokenizer.convert_tokens_to_ids(END[name])
    differing = 0
    for row in rows_of(real_rows, "kto_en_demo.json")[:150] + rows_of(real_rows, "alpaca_en_demo.json")[:150]:
        messages = [turn.message() for turn in row.turns]
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=jinja, return_dict=True, return_assistant_tokens_mask=True
        )
        ours = learnt(tokenizer, template, row, tuple(row.answers))
        assert ours.ids == theirs["input_ids"]
        for position, (label, mask) in enumerate(zip(ours.labels, theirs["assistant_masks"], strict=True)):
            if (label != IGNORED) != bool(mask):
                behind = ours.ids[position - 1] == end and ours.ids[position] in line_breaks
                assert behind, f"token {position}, {tokenizer.decode(ours.ids[position])!r}"
                differing += 1
        assert ours.labels.count(end) == len(row.answers), "every answer's end is learnt"
    assert (differing == 0) == (name == "llama3_1"), "only its template writes no line break there"


@pytest.mark.parametrize("name", END)
def test_completion_masks_are_trls_but_for_tokens_that_straddle(
    name: str, real_tokenizer: Real, real_rows: Path
) -> None:
    tokenizer = real_tokenizer(name)
    template = TextTemplate("bare", "{instruction}{output}", str(tokenizer.eos_token))
    equal = 0
    for number, row in enumerate(rows_of(real_rows, "alpaca_en_demo.json")[:150]):
        prompt, completion = row.turns[0].content + ("\nAnswer:\n" if number % 2 else ""), row.last_answer
        ours = learnt(tokenizer, template, conversation(("user", prompt), ("assistant", completion)), (1,))
        whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        assert ours.ids == whole
        theirs = common_prefix_length(tokenizer(prompt)["input_ids"], whole)
        first = next(n for n, label in enumerate(ours.labels) if label != IGNORED)
        assert ours.labels[first:] == whole[first:]
        if first == theirs:
            equal += 1
        else:  # what TRL learns more begins in the prompt
            begins = len(tokenizer.decode(whole[: first - 1]).removeprefix(str(tokenizer.bos_token)))
            assert first > theirs
            assert begins < len(prompt)
    assert equal >= 60, "with a line break between them nothing straddles"


def test_a_straddling_token_is_not_learnt(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("llama3_1")
    template = TextTemplate("bare", "{instruction}{output}", "<|eot_id|>")
    row = conversation(("user", "a sun"), ("assistant", "flower grows"))
    ours = learnt(tokenizer, template, row, (1,))
    pieces = [tokenizer.decode([token]) for token in ours.ids]
    assert pieces == ["<|begin_of_text|>", "a", " sun", "flower", " grows", "<|eot_id|>"]
    assert texts_of(tokenizer, ours) == ["flower grows<|eot_id|>"]
    ours = learnt(tokenizer, template, conversation(("user", "a sunf"), ("assistant", "lower grows")), (1,))
    assert texts_of(tokenizer, ours) == [" grows<|eot_id|>"], "'flower' holds the prompt's f"
    ours = learnt(tokenizer, template, conversation(("user", "Answer: "), ("assistant", "yes")), (1,))
    assert texts_of(tokenizer, ours) == ["<|eot_id|>"], "' yes' holds the prompt's space, which offsets leave out"


def test_a_straddling_space_is_seen_though_offsets_leave_it_out() -> None:
    """With ``trim_offsets``, as RoBERTa's tokenizer has it, ' y' is said to begin at the y."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġy", "</s>"]
    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(alphabet)}, merges=[("Ġ", "y")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer("a y", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 3)]
    template = TextTemplate("bare", "{instruction}{output}", "</s>")
    ours = learnt(tokenizer, template, conversation(("user", "a "), ("assistant", "yx")), (1,))
    assert [tokenizer.convert_ids_to_tokens(n) for n in ours.labels if n != IGNORED] == ["x", "</s>"]
    ours = learnt(tokenizer, template, conversation(("user", "a"), ("assistant", " yx")), (1,))
    assert [tokenizer.convert_ids_to_tokens(n) for n in ours.labels if n != IGNORED] == ["Ġy", "x", "</s>"]


@pytest.mark.parametrize("name", END)
def test_answers_in_korean_of_several_tokens_a_character_are_learnt_whole(name: str, real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer(name)
    row = conversation(("user", "뷁?"), ("assistant", "쀍 안녕 👩‍🌾"), ("user", "또"), ("assistant", "끝 ﷽"))
    ours = learnt(tokenizer, ChatTemplate(tokenizer), row, (1, 3))
    end, think = END[name], "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert texts_of(tokenizer, ours) == [f"쀍 안녕 👩‍🌾{end}", f"{think}끝 ﷽{end}"]
    assert ours.ids == applied(tokenizer, row)


@pytest.mark.parametrize("name", END)
@pytest.mark.parametrize("answer", ["  spaces around  ", "\n\nbreaks\n", "", "same", "a</b><|x|>", "user\nquestion"])
def test_odd_answers_are_found(name: str, answer: str, real_tokenizer: Real) -> None:
    """Templates trim them or not; what is learnt is all that the row's rendering holds behind the prompt."""
    tokenizer = real_tokenizer(name)
    template = ChatTemplate(tokenizer)
    row = conversation(("user", "same"), ("assistant", answer), ("user", "question"), ("assistant", answer))
    rendered = template.render(row, (1, 3))
    first, second = rendered.answers
    for found, turns in ((first, row.turns[:1]), (second, row.turns[:3])):
        prompt = template.prompt(Conversation(turns))
        if name != "qwen3":
            assert rendered.text[: found.start] == prompt
        assert rendered.text[found.start : found.end].endswith(END[name])
        said = rendered.text[found.start : found.end].removesuffix(END[name])
        assert said.replace("<think>\n\n</think>\n\n", "").strip() == answer.strip()
    assert rendered.text[second.end :].strip() == ""


def test_reasoning_that_a_template_drops_from_earlier_turns_does_not_shift_answers(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("qwen3")
    thought = "<think>\nhm\n</think>\n\n"
    row = conversation(
        ("user", "one"), ("assistant", f"{thought}1"), ("user", "two"), ("assistant", f"{thought}2"), ("user", "three"),
        ("assistant", f"{thought}3"),
    )  # fmt: skip
    ours = learnt(tokenizer, ChatTemplate(tokenizer), row, (1, 3, 5))
    assert texts_of(tokenizer, ours) == ["1<|im_end|>", "2<|im_end|>", f"{thought}3<|im_end|>"]
    assert ours.ids == applied(tokenizer, row)


def test_calls_are_learnt_as_the_template_writes_them_and_tools_answers_are_not(real_tokenizer: Real) -> None:
    tokenizer = real_tokenizer("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "둘"]}}}
    row = Conversation(
        (
            Turn("user", "1+2?"),
            Turn("assistant", "", tool_calls=(call,)),
            Turn("tool", "3"),
            Turn("assistant", "It is 3."),
        ),
        tools=({"type": "function", "function": {"name": "add", "parameters": {}}},),
    )
    ours = learnt(tokenizer, ChatTemplate(tokenizer), row, (1, 3))
    assert texts_of(tokenizer, ours) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "둘"]}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is 3.<|im_end|>",
    ]
    assert ours.ids == applied(tokenizer, row)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (Conversation((Turn("user", "a"), Turn("assistant", "", tool_calls=({"function": {}},)))), "tool calls"),
        (Conversation((Turn("user", "a"), Turn("assistant", "b", reasoning="c"))), "reasoning"),
        (Conversation((Turn("user", "a"), Turn("assistant", "b")), tools=({"function": {}},)), "tools"),
    ],
)
def test_what_a_template_would_leave_out_in_silence_is_refused(
    row: Conversation, what: str, real_tokenizer: Real
) -> None:
    with pytest.raises(DataError, match=f"it holds {what}, which the chat template does not write"):
        ChatTemplate(real_tokenizer("smollm2")).render(row)


def test_what_a_template_refuses_is_an_error_in_its_words(real_tokenizer: Real) -> None:
    row = conversation(("assistant", "Hello."), ("user", "Hi."))
    with pytest.raises(DataError, match="the chat template refuses it: Conversation roles must alternate"):
        ChatTemplate(real_tokenizer("gemma3")).render(row)


def test_a_tokenizer_without_a_chat_template_says_so_with_a_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"has no chat template.* set data.template to a Jinja chat template"):
        ChatTemplate(tokenizer)


BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_ends_no_turn_gets_eos_behind_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = ChatTemplate(tokenizer, BARE).render(row, (1, 3))
    assert rendered.text == "user: a\nassistant: b\nuser: c\nassistant: d\n</s>"
    assert [rendered.text[a.start : a.end] for a in rendered.answers] == ["b", "d\n</s>"]


@pytest.mark.parametrize(
    ("name", "mid", "last"), [("gptoss", "<|end|>", "<|return|>"), ("phi3", "<|end|>", "<|end|>\n</s>")]
)
def test_an_earlier_turns_end_is_learnt_where_the_last_one_ends_otherwise(
    name: str, mid: str, last: str, byte_tokenizer: Callable[[bool], PreTrainedTokenizerFast]
) -> None:
    tokenizer = byte_tokenizer(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|return|>"]})
    template = ChatTemplate(tokenizer, (TRL_TEMPLATES / f"{name}_training.jinja").read_text())
    row = conversation(("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second"))
    rendered = template.render(row, (1, 3))
    one, two = (rendered.text[answer.start : answer.end] for answer in rendered.answers)
    assert one.endswith(f"first{mid}")
    assert two.endswith(f"second{last}")
    unknown = ChatTemplate(byte_tokenizer(False), template.jinja)
    with pytest.raises(DataError, match=r"turn 1 in another way, so its end is not known: set data\.learn: all"):
        unknown.render(row, (1, 3))


OPENED = {
    "cohere", "cohere2", "gemma", "gemma3", "glm4moe", "lfm2", "lfm2_v2", "llama3", "qwen2_5_vl", "qwen3",
    "qwen3_instruct_2507", "qwen3_vl",
}  # fmt: skip
"""TRL's templates that mark exactly what stands behind the prompt. Others mark a piece of what opens an answer too."""


@pytest.mark.parametrize("name", sorted(OPENED))
def test_answers_are_where_trls_markers_are_in_every_template(name: str, real_tokenizer: Real) -> None:
    """Characters, so that any tokenizer will do: ``{% generation %}`` spans and ours, white space at the end apart."""
    tokenizer = real_tokenizer("llama3_1")
    jinja = (TRL_TEMPLATES / f"{name}_training.jinja").read_text()
    row = conversation(("user", "Hi"), ("assistant", "Hello there."), ("user", "again"), ("assistant", "bye\nbye"))
    messages = [turn.message() for turn in row.turns]
    (text,), (marked,) = render_jinja_template(
        [messages], chat_template=jinja, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    rendered = ChatTemplate(tokenizer, jinja).render(row, (1, 3))
    assert rendered.text == text
    assert [text[a.start : a.end] for a in rendered.answers] == [text[start:end].rstrip() for start, end in marked]


def test_a_template_that_asks_for_a_system_turn_is_asked_row_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    refusal = "{% if messages[0].role != 'system' %}{{ raise_exception('system!') }}{% endif %}"
    jinja = refusal + BARE.replace("\n", "</s>")
    row = conversation(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = ChatTemplate(tokenizer, jinja).render(row, (2, 4))
    assert rendered.text == "system: s</s>user: a</s>assistant: b</s>user: c</s>assistant: d</s>", "no second EOS"
    assert [rendered.text[a.start : a.end] for a in rendered.answers] == ["b</s>", "d</s>"]


def test_a_template_that_drops_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = "{% for m in messages %}{% if loop.index0 != 1 %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="leaves out turn 1, an answer"):
        ChatTemplate(tokenizer, jinja).render(conversation(("user", "a"), ("assistant", "b"), ("user", "c")), (1,))


def test_white_space_before_an_earlier_turns_end_is_part_of_it(tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<pad>' if loop.last else ' </s>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    rendered = ChatTemplate(tokenizer, jinja).render(row, (1, 3))
    assert [rendered.text[a.start : a.end] for a in rendered.answers] == ["b </s>", "d<pad>"]


def test_an_answer_that_is_opened_in_another_way_begins_where_the_ways_part(tokenizer: PreTrainedTokenizerFast) -> None:
    jinja = (
        "{% for m in messages %}{% if m.tool_calls %}[CALL]{{ m.tool_calls[0].function.name }}{% else %}"
        "<{{ m.role }}>{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = Conversation((Turn("user", "a"), Turn("assistant", "", tool_calls=(call,))))
    rendered = ChatTemplate(tokenizer, jinja).render(row, (1,))
    assert [rendered.text[a.start : a.end] for a in rendered.answers] == ["[CALL]f</s>"]
