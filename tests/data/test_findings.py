"""``data.findings``: what a finding says and when it stops, and that docs/checks.md has every code as it is."""

import re
from pathlib import Path

import pytest

from jebi.data.findings import CODES, Finding, Report, require_codes
from jebi.errors import CheckError, ConfigError, DataError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checks.md"


def test_the_page_has_a_line_for_every_code_that_says_whether_it_stops() -> None:
    lines = re.findall(r"^\| `([a-z-]+)` \| (stops|warns) \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert lines == [(name, "stops" if code.stops else "warns") for name, code in CODES.items()]


def test_a_line_names_the_code_the_rows_and_the_way_out() -> None:
    finding = Finding("missing-eos", 7, 1200, (3, 4, 5, 8, 9))
    assert finding.line() == (
        "missing-eos: 7 of 1,200 rows (rows 3, 4, 5, 8, 9, ...) do not end with an EOS, so the model does not learn to "
        "stop and repeats for ever: end every text with tokenizer.eos_token."
    )
    assert "(row 3)" in Finding("leak", 1, 2, (3,)).line()


def test_what_stops() -> None:
    rule, accident, warning = (
        Finding("missing-eos", 5, 10, (0,)),
        Finding("empty-answers", 4, 10, (0,)),
        Finding("leak", 10, 10, (0,)),
    )
    report = Report((rule, accident, warning), 10, "A note.")
    assert report.stopping() == [rule]
    with pytest.raises(
        CheckError, match=r"not worth training on\. missing-eos: .*To train all the same: --allow missing-eos"
    ):
        report.require()
    with pytest.raises(DataError):
        report.require(allow=["leak"])
    report.require(allow=["missing-eos"])
    assert list(report.lines(["missing-eos", "leak"])) == [accident.line(), "A note."]


def test_an_unknown_code_is_refused() -> None:
    require_codes(CODES, "allow")
    with pytest.raises(
        ConfigError, match=r"allow: 'missing-eso' is no code of the check. Did you mean 'missing-eos'\?"
    ):
        require_codes(["missing-eso"], "allow")
