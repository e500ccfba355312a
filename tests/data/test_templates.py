"""``data.templates``: one object makes training rows and prompts, and they agree on where the answer begins."""

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jebi.data.chat_template import ChatTemplate
from jebi.data.conversation import Conversation, Turn, question
from jebi.data.templates import ALPACA, ALPACA_NO_INPUT, TUTORIAL, TextTemplate, check, named
from jebi.errors import ConfigError, DataError


def asked(instruction: str, input: str, output: str) -> Conversation:
    return Conversation((Turn("user", instruction, input), Turn("assistant", output)))


@pytest.mark.parametrize("name", ["tutorial", "alpaca", "Q: {instruction} {input}\nA: {output}"])
def test_a_row_is_its_prompt_its_answer_and_eos(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    template = named(name, tokenizer)
    rendered = template.render(asked("질문?", "자료", "{대답}"), (1,))
    assert rendered.text == template.prompt(question("질문?", "자료")) + "{대답}" + "</s>"
    (answer,) = rendered.answers
    assert rendered.text[answer.start : answer.end] == "{대답}</s>"
    assert template.render(asked("질문?", "자료", "{대답}")).answers == (), "none asked for"


def test_the_tutorials_text_is_the_tutorials(tokenizer: PreTrainedTokenizerFast) -> None:
    assert named("tutorial", tokenizer).render(asked("i", "x", "o")).text == (
        "아래에는 작업을 설명하는 지시 사항과 추가적인 컨텍스트를 제공하는 입력이 있습니다. "
        "요청을 적절하게 완료하는 응답을 작성하세요.\n\n### instruction:\ni\n\n### input:\nx\n\n### output:\no</s>"
    )
    assert named("tutorial", tokenizer).prompt(question("i")) == TUTORIAL.format(instruction="i", input="", output="")


def test_english_alpaca_has_a_text_for_questions_without_input(tokenizer: PreTrainedTokenizerFast) -> None:
    template = named("alpaca", tokenizer)
    assert template.prompt(question("i", "x")) == ALPACA.format(instruction="i", input="x", output="")
    assert template.prompt(question("i")) == ALPACA_NO_INPUT.format(instruction="i", output="")
    assert "### Input" not in template.prompt(question("i"))


def test_braces_in_a_row_are_text() -> None:
    template = TextTemplate("t", "{instruction}|{output}", ".")
    assert template.render(asked("{0} {x", "", "}{output}")).text == "{0} {x|}{output}."


def test_doubled_braces_in_a_template_are_literal() -> None:
    template = TextTemplate("t", "{{json}} {instruction} -> {output}{{end}}", ".")
    assert template.prompt(question("a")) == "{json} a -> "
    assert template.render(asked("a", "", "b")).text == "{json} a -> b{end}."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("plain", "no places"),
        ("{output}", "output"),
        ("{output} {instruction}", "instruction"),
        ("{instruction} {question} {output}", "question"),
        ("{instruction} {} {output}", "''"),
        ("{instruction} {output} {input}", "input"),
        ("{instruction} {output} {output}", "output"),
    ],
)
def test_a_template_without_the_right_places_is_refused(text: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"output}} last; found .*{found}"):
        check(text)


@pytest.mark.parametrize("text", ["{instruction {output}", "{instruction} } {output}"])
def test_a_broken_brace_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match="Write a literal brace twice"):
        check(text)


@pytest.mark.parametrize("text", ["{instruction} {output!r}", "{instruction} {output:>9}", "{instruction!s} {output}"])
def test_conversions_are_refused_since_the_prompt_could_not_be_split_off(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("write {output}, not {output!r} or {output:9}")):
        check(text)


def test_text_after_the_answer_belongs_to_the_row_and_not_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    template = named("<user>{instruction}<bot>{output}<end>\n", tokenizer)
    rendered = template.render(asked("a", "", "b"), (1,))
    assert rendered.text == "<user>a<bot>b<end>\n</s>"
    assert rendered.text[rendered.answers[0].start : rendered.answers[0].end] == "b<end>\n</s>"
    assert template.prompt(question("a")) == "<user>a<bot>"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            Conversation((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))),
            "3 turns",
        ),
        (Conversation((Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"))), r"2 turns \(system, user\)"),
        (Conversation((Turn("user", "a"), Turn("assistant", "b")), tools=({},)), "tools"),
        (Conversation((Turn("user", "a"), Turn("assistant", "b", tool_calls=({},)))), "tool calls"),
    ],
)
def test_what_it_has_no_place_for_is_refused_with_a_way_out(
    row: Conversation, what: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=rf"template 'tutorial' holds one question .*not .*{what}.*data.template: chat"):
        named("tutorial", tokenizer).render(row)


def test_a_row_without_an_answer_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="ends with a turn of role 'user', so there is no answer"):
        named("tutorial", tokenizer).render(question("a"))


JINJA = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def test_a_jinja_chat_template_is_a_template_as_text_and_as_file(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(JINJA)
    for spec in (JINJA, str(tmp_path / "own.jinja")):
        template = named(spec, tokenizer)
        assert isinstance(template, ChatTemplate)
        rendered = template.render(asked("a", "x", "b"), (1,))
        assert rendered.text == "[user]a\nx</s>[assistant]b</s>"
        assert named(template.spec, tokenizer).spec == template.spec == JINJA
    with pytest.raises(ConfigError, match=r"template 'none.jinja' cannot be read"):
        check("none.jinja")


def test_what_is_no_jinja_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    check("{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}")
    broken = JINJA.replace("{% endfor %}", "\n{% endif %}")
    (tmp_path / "own.jinja").write_text(broken)
    for spec, name in ((broken, r"data\.template"), (str(tmp_path / "own.jinja"), r"template '.*own\.jinja'")):
        with pytest.raises(ConfigError, match=rf"{name} is no Jinja: .*endif.* \(line 2\)\."):
            check(spec)
