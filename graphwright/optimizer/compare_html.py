"""A comparison of targets as one HTML page, in the report's style: no scripts, works offline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from graphwright.optimizer.compare_text import COLUMNS, NOTE, Plans, cells, letter_plans, plan_line
from graphwright.optimizer.report_html import Markup, element, join
from graphwright.optimizer.report_rows import workload_line
from graphwright.optimizer.report_style import STYLE

if TYPE_CHECKING:
    from graphwright.optimizer.compare import Comparison

_CLASS = {"yes": "status good", "no": "status bad"}


def render_page(comparison: Comparison) -> str:
    """A whole HTML document."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = element(
        "head",
        Markup(f'<meta charset="utf-8">{viewport}'),
        element("title", f"graphwright: {comparison.model} on several targets"),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("main", join(_parts(comparison)), class_="gw"))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _parts(comparison: Comparison) -> Iterator[Markup]:
    facts = (("Model", comparison.model), ("Workload", workload_line(comparison.workload)))
    terms = join(element("div", element("dt", name), element("dd", text or "-")) for name, text in facts)
    yield element("header", element("h1", "graphwright comparison"), element("dl", terms))
    plans = letter_plans(comparison)
    yield element("section", element("h2", "Targets"), _table(comparison, plans))
    reasons = [element("li", f"{row.target}: {row.reason}") for row in comparison.rows if row.reason]
    if reasons:
        yield element("section", element("h2", "What does not fit"), element("ul", join(reasons)))
    listed = (element("li", f"{letter}: ", element("code", plan_line(p))) for p, letter in plans.items())
    yield element("section", element("h2", "Plans"), element("ul", join(listed)))
    yield element("footer", element("p", NOTE))


def _table(comparison: Comparison, plans: Plans) -> Markup:
    head = element("tr", join(element("th", name, scope="col") for name in COLUMNS))
    rows = join(_row(cells(row, plans)) for row in comparison.rows)
    table = element("table", element("thead", head), element("tbody", rows), class_="wide")
    return element("div", table, class_="scroll")


def _row(words: tuple[str, ...]) -> Markup:
    """One row; each cell knows its column's name, which a phone shows in place of the head."""
    return element("tr", join(_cell(name, word) for name, word in zip(COLUMNS, words, strict=True)))


def _cell(name: str, word: str) -> Markup:
    inside = element("span", word, class_=_CLASS[word]) if word in _CLASS else word
    return element("td", inside, data_name=name)
