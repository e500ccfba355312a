"""Render a comparison as one HTML page that needs nothing else: no network, no other file.

What the models said is untrusted. All text goes through `_text`, which escapes it, and the page's content
policy runs no script but the one whose hash it names. The figures come from `comparison`, the curve from
`loss_chart`, style and script from `page_style`; here they are only put in place.
"""

import base64
import hashlib
import html
import json
import re

from jebi.inference.comparison import NOTHING, Answer, Comparison, Figure, printable
from jebi.inference.loss_chart import loss_chart, smoothing
from jebi.inference.page_style import SCRIPT, STYLE

_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_LONG = 900  # characters after which an answer scrolls in place and does not fill the page


def render(comparison: Comparison) -> str:
    """Return the whole page."""
    title = _text(f"{comparison.adapter} compared with {comparison.model}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy()}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_header(comparison)}
{_curve(comparison)}
{_answers(comparison)}
{_settings(comparison)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _policy() -> str:
    """Return a content policy that fetches nothing and runs the page's own script only."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _text(value: object) -> str:
    """Return a value as escaped text."""
    return html.escape(printable(str(value)))


def _language(text: str) -> str:
    """Return the attributes of an element that holds the text: Korean breaks its lines between words."""
    return ' dir="auto" lang="ko"' if _HANGUL.search(text) else ' dir="auto"'


def _header(comparison: Comparison) -> str:
    """Return the finding, the two models and the figures."""
    base, tuned = comparison.base, comparison.tuned
    return f"""<header>
<p class="mark">jebi compare</p>
<h1>{_text(_finding(comparison))}</h1>
<dl class="models">
<dt><span class="swatch"></span>{_text(base.name)}</dt><dd>{_text(comparison.model)}</dd>
<dt><span class="swatch tuned"></span>{_text(tuned.name)}</dt><dd>{_text(comparison.adapter)}</dd>
</dl>
<div class="figures">
{"".join(map(_figure, comparison.figures()))}</div>
</header>"""


def _finding(comparison: Comparison) -> str:
    """Say in one sentence what the comparison is about: the refusals, else the loss."""
    harmful, base, tuned = comparison.harmful, comparison.base, comparison.tuned
    if harmful:
        before, after = (sum(flags) for flags in zip(*((each.base_declined, each.tuned_declined) for each in harmful)))
        return (
            f"After fine-tuning, the model declines {after}\u00a0of\u00a0{len(harmful)} harmful "
            f"question{'s' if len(harmful) > 1 else ''}. Before, it declined {before or 'none'}."
        )
    if base.heldout_loss is not None and tuned.heldout_loss is not None:
        return f"Held-out loss went from {base.heldout_loss:.2f} to {tuned.heldout_loss:.2f}."
    return "The model before and after fine-tuning, asked the same questions."


def _figure(figure: Figure) -> str:
    """Return the card of one figure, with a bar for each model."""
    known = [value for value in (figure.base, figure.tuned) if value is not None]
    values = f'<span class="to">{NOTHING}</span>'
    if known:
        values = (
            f'<span class="from">{figure.shown(figure.base)}</span><span class="arrow">→</span>'
            f'<span class="to">{figure.shown(figure.tuned)}</span>'
        )
    full = 1.0 if figure.unit == "share" else max(known, default=0.0)
    count = f"<span>of {figure.of}</span>" if figure.of else ""
    worse = ' class="worse"' if figure.improved is False else ""
    return f"""<div class="figure">
<h2>{_text(figure.label)}</h2>
<p class="values">{values}</p>
<p class="change"><span{worse}>{figure.shown_change() if known else "not measured"}</span>{count}</p>
<div class="bar">{_bar(figure.base, full)}</div>
<div class="bar tuned">{_bar(figure.tuned, full)}</div>
</div>
"""


def _bar(value: float | None, full: float) -> str:
    """Return the filled part of a bar; nothing when there is nothing to show."""
    return f'<i style="width: {100 * value / full:.1f}%"></i>' if value and full > 0 else ""


def _curve(comparison: Comparison) -> str:
    """Return the training loss, with its legend when there is a line to explain."""
    curve = comparison.loss_curve
    legend = f'<p class="note"><span class="swatch"></span>each logged step &ensp; \
<span class="swatch tuned"></span>{smoothing(len(curve))}</p>'
    chart = loss_chart(curve)
    return f"""<section>
<div class="head"><h2>Training loss</h2>{legend if len(curve) > 1 else ""}</div>
{f'<div class="chart">{chart}</div>' if curve else chart}
</section>"""


def _answers(comparison: Comparison) -> str:
    """Return every answer, side by side, with the filter."""
    counts = {
        "all": len(comparison.answers),
        "harmful": len(comparison.harmful),
        "ordinary": len(comparison.ordinary),
    }
    buttons = "".join(
        f'<button type="button" value="{kind}" aria-pressed="{"true" if kind == "all" else "false"}"'
        f"{'' if count else ' disabled'}>"
        f"{kind.capitalize()} {count}</button>"
        for kind, count in counts.items()
    )
    names = comparison.base.name, comparison.tuned.name
    answers = "\n".join(_answer(answer, names) for answer in comparison.answers)
    return f"""<section>
<div class="head"><h2>Answers</h2>
<div class="filter" role="group" aria-label="Show" hidden>{buttons}</div></div>
<div class="answers" data-show="all">
{answers}
</div>
</section>"""


def _answer(answer: Answer, names: tuple[str, str]) -> str:
    """Return one question with both answers."""
    kind = "harmful" if answer.harmful else "ordinary"
    mark = '<span class="badge bad">harmful</span>' if answer.harmful else ""
    base = _side(answer.base, _badges(answer.harmful, answer.base_declined, answer.base_stopped))
    tuned = _side(answer.tuned, _badges(answer.harmful, answer.tuned_declined, answer.tuned_stopped))
    return f"""<article class="answer {kind}">
<div class="question"><p{_language(answer.question)}>{_text(answer.question)}</p>{mark}</div>
<div class="side"><div class="who"><b>{_text(names[0])}</b>{base}</div>
<div class="side tuned"><div class="who"><b>{_text(names[1])}</b>{tuned}</div>
</article>"""


def _badges(harmful: bool, declined: bool, stopped: bool) -> str:
    """Return what became of an answer; declining is right for a harmful question and wrong for another."""
    colour = ("good" if declined else "bad") if harmful else ("bad" if declined else "")
    verdict = f'<span class="badge {colour}">{"declined" if declined else "answered"}</span>'
    return verdict if stopped else verdict + '<span class="badge cut">did not stop</span>'


def _side(said: str, badges: str) -> str:
    """Return the badges and the answer of one model, closing the line that names it."""
    if not said.strip():
        return f'{badges}</div><p class="said empty">no text</p>'
    scrolls = ' class="said long" tabindex="0"' if len(said) > _LONG else ' class="said"'
    return f"{badges}</div><p{scrolls}{_language(said)}>{_text(said.strip())}</p>"


def _settings(comparison: Comparison) -> str:
    """Return how the answers were made, and the rule behind "declined"."""
    measured: dict[str, object] = {}
    for side in (comparison.base, comparison.tuned):
        if side.heldout_loss is not None:
            measured[f"held-out tokens, {side.name}"] = f"{side.heldout_tokens:,}"
        if side.load_s is not None:
            measured[f"seconds to load, {side.name}"] = f"{side.load_s:.2f}"
    rows = "\n".join(
        f'<tr><th scope="row">{_text(name.replace("_", " "))}</th><td>{_text(_setting(value))}</td></tr>'
        for name, value in (comparison.settings | measured).items()
    )
    return f"""<section>
<div class="head"><h2>Settings</h2></div>
<table>
{rows}
</table>
<p class="rule"><b>What counts as declined.</b> {_text(comparison.decline_rule)}</p>
</section>"""


def _setting(value: object) -> str:
    """Return a setting as it would be written in a config file, without quotes around text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
