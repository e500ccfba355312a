"""``data.templates``: one object makes training rows and prompts, and they agree on where the answer begins."""

import re

import pytest

from jebi.data.templates import ALPACA, TUTORIAL, Template, named
from jebi.errors import ConfigError


@pytest.mark.parametrize("name", ["tutorial", "alpaca", "Q: {instruction} {input}\nA: {output}"])
def test_a_row_is_its_prompt_its_answer_and_eos(name: str) -> None:
    template = named(name)
    row = template.row("질문?", "자료", "{대답}", "</s>")
    assert row == template.prompt("질문?", "자료") + "{대답}" + "</s>"


def test_the_tutorials_text_is_the_tutorials() -> None:
    assert named("tutorial").row("i", "x", "o", "<eos>") == (
        "아래에는 작업을 설명하는 지시 사항과 추가적인 컨텍스트를 제공하는 입력이 있습니다. "
        "요청을 적절하게 완료하는 응답을 작성하세요.\n\n### instruction:\ni\n\n### input:\nx\n\n### output:\no<eos>"
    )
    assert named("tutorial").text == TUTORIAL
    assert named("alpaca").text == ALPACA


def test_braces_in_a_row_are_text() -> None:
    assert Template("{instruction}|{output}").row("{0} {x", "", "}{output}", ".") == "{0} {x|}{output}."


def test_doubled_braces_in_a_template_are_literal() -> None:
    template = Template("{{json}} {instruction} -> {output}")
    assert template.prompt("a") == "{json} a -> "


def test_an_input_that_a_file_leaves_out_is_empty_not_none() -> None:
    template = Template("{instruction}|{input}|{output}")
    assert template.row("a", None, "b", ".") == "a||b."
    assert template.prompt("a", None) == "a||"


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
        named(text)


@pytest.mark.parametrize("text", ["{instruction {output}", "{instruction} } {output}"])
def test_a_broken_brace_is_explained(text: str) -> None:
    with pytest.raises(ConfigError, match="Write a literal brace twice"):
        named(text)


@pytest.mark.parametrize("text", ["{instruction} {output!r}", "{instruction} {output:>9}", "{instruction!s} {output}"])
def test_conversions_are_refused_since_the_prompt_could_not_be_split_off(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape("write {output}, not {output!r} or {output:9}")):
        named(text)


def test_text_after_the_answer_belongs_to_the_row_and_not_to_the_prompt() -> None:
    template = named("<user>{instruction}<bot>{output}<end>\n")
    assert template.row("a", "", "b", "</s>") == "<user>a<bot>b<end>\n</s>"
    assert template.prompt("a") == "<user>a<bot>"
