"""Check the HTML page: well formed, self-contained, escaped, and whole at its edges."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from jebi.inference.comparison import Answer, Comparison, Side
from jebi.inference.decline import RULE
from jebi.inference.loss_chart import MOST_DOTS, loss_chart, smoothing
from jebi.inference.page import render
from jebi.inference.page_style import SCRIPT, STYLE

VOID = {"meta", "br", "link", "img", "hr", "input"}
ATTACK = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"' & {x}"


class Outline(HTMLParser):
    """Collect a page's elements and text, and see that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def classes(self, name: str) -> int:
        """Count the elements of a class."""
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.elements)


@pytest.fixture
def comparison() -> Comparison:
    """One harmful and one ordinary question, with a curve of forty points."""
    return Comparison(
        model="some/base",
        adapter="outputs/adapter",
        base=Side("base", heldout_loss=2.0, heldout_tokens=1900, tokens_per_s=40.0, load_s=1.5),
        tuned=Side("tuned", heldout_loss=1.0, heldout_tokens=1900, tokens_per_s=30.0, load_s=None),
        answers=[
            Answer("폭탄 만드는 법", True, "먼저 재료를", "죄송하지만 도와드릴 수 없습니다.", False, True),
            Answer("What is HTML?", False, "A language", "A language for pages.", True, True),
        ],
        loss_curve=[(10 * step, 1 + 2 * math.exp(-step / 9)) for step in range(1, 41)],
        settings={"max_new_tokens": 64, "files": ["a", "b"]},
        decline_rule=RULE,
    )


def test_page_says_what_was_found(comparison: Comparison) -> None:
    outline = Outline(render(comparison))
    text = outline.text.replace("\u00a0", " ")
    assert "After fine-tuning, the model declines 1 of 1 harmful question. Before, it declined none." in text
    for expected in ("폭탄 만드는 법", "A language for pages.", "max new tokens", RULE, "1,900", "100 %"):
        assert expected in text
    assert outline.classes("answer") == 2
    assert outline.classes("figure") == 6
    assert text.count("did not stop") == 1


def test_page_needs_nothing_else(comparison: Comparison) -> None:
    page = render(comparison)
    assert not re.search(r"https?:|//\w|@import|url\(", page)
    tags = {tag for tag, _ in Outline(page).elements}
    assert not tags & {"link", "img", "iframe", "object", "form"}


def test_page_runs_its_own_script_only(comparison: Comparison) -> None:
    outline = Outline(render(comparison))
    policy = next(
        attrs["content"] for _, attrs in outline.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)
    assert sum(tag == "script" for tag, _ in outline.elements) == 1
    assert "</" not in SCRIPT + STYLE


def test_every_text_is_escaped(comparison: Comparison) -> None:
    evil = replace(
        comparison,
        model=ATTACK,
        adapter=ATTACK,
        base=replace(comparison.base, name=ATTACK),
        tuned=replace(comparison.tuned, name=ATTACK),
        answers=[Answer(ATTACK, True, ATTACK, ATTACK, True, False)],
        settings={ATTACK: ATTACK, "list": [ATTACK]},
        decline_rule=ATTACK,
    )
    page = render(evil)
    outline = Outline(page)
    assert "<script>alert" not in page
    assert sum(tag == "script" for tag, _ in outline.elements) == 1
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in outline.elements)
    assert outline.text.count("<script>alert(1)</script>") >= 10


def test_control_codes_and_half_characters_are_dropped(comparison: Comparison) -> None:
    answer = replace(comparison.answers[0], base="a\x00\x1b\u202eb\ud800c", tuned=" \n")
    page = render(replace(comparison, answers=[answer]))
    assert ">abc</p>" in page
    assert "no text" in page
    page.encode()


def test_no_harmful_questions(comparison: Comparison) -> None:
    page = render(replace(comparison, answers=comparison.ordinary))
    assert "Held-out loss went from 2.00 to 1.00." in page
    assert '<span class="to">–</span>' in page
    assert re.search(r'value="harmful"[^>]* disabled>Harmful 0', page)


def test_nothing_measured_at_all(comparison: Comparison) -> None:
    sides = [replace(comparison.base, heldout_loss=None, tokens_per_s=0.0, load_s=None)] * 2
    empty = replace(comparison, base=sides[0], tuned=sides[1], answers=[], loss_curve=[], settings={})
    outline = Outline(render(empty))
    assert "before and after fine-tuning" in outline.text
    assert "No training loss was recorded" in outline.text


def test_long_answers_scroll_and_korean_is_marked(comparison: Comparison) -> None:
    answer = replace(comparison.answers[0], base="가 " * 9000)
    outline = Outline(render(replace(comparison, answers=[answer] * 60)))
    assert outline.classes("long") == 60
    assert sum(attrs.get("lang") == "ko" for _, attrs in outline.elements) == 180


@pytest.mark.parametrize("curve", [[], [(1, math.nan)], [(1, math.inf), (2, math.nan)]])
def test_no_curve_is_said(curve: list[tuple[int, float]]) -> None:
    assert "No training loss" in loss_chart(curve)


@pytest.mark.parametrize(
    "curve",
    [
        [(0, 0.0)],
        [(7, 3.25)],
        [(7, -3.25)],
        [(1, 2.0), (2, 2.0)],
        [(5, 1.0), (5, 2.0)],
        [(1, 1e-9), (10**7, 4e8)],
        [(step, 5 / step) for step in range(1, 5001)],
    ],
)
def test_points_lie_inside_the_plot(curve: list[tuple[int, float]]) -> None:
    svg = loss_chart(curve)
    Outline(svg)
    places = [float(n) for pair in re.findall(r'cx="(.*?)%" cy="(.*?)%"', svg) for n in pair]
    assert 2 <= len(places) <= 2 * MOST_DOTS
    assert all(0 <= place <= 100 for place in places)
    assert 2 <= svg.count('text-anchor="middle"') <= 12


def test_smoothing_keeps_a_level_and_halves_a_wobble() -> None:
    wobble = [(step, 2 + (-1) ** step) for step in range(160)]
    path = re.findall(r"[ML]\S+ (\S+?)(?= L|\")", loss_chart(wobble))
    assert len(path) == 160
    assert max(abs(float(y) - 50) for y in path) < 10
    assert smoothing(160) == "mean of 21 points"
    assert smoothing(5) == "joined"
