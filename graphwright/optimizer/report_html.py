"""The report as one HTML page: no scripts, no fonts or images from elsewhere, works offline.

Every text goes through :func:`element`, which escapes it; nothing else writes markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

from graphwright.optimizer.quantities import clean, label, quantity
from graphwright.optimizer.report import Status
from graphwright.optimizer.report_rows import (
    COMPILED_COLUMNS,
    PlanRow,
    Row,
    bound_lines,
    comparison_rows,
    compiled_rows,
    compiled_title,
    crossover_lines,
    flatten,
    group_decisions,
    headlines,
    kernel_counts,
    plan_rows,
    plans_are_exact,
    timing_line,
    workload_line,
)
from graphwright.optimizer.report_style import STYLE

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report
    from graphwright.optimizer.report_svg import Plot


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """``<tag attributes>children</tag>``; children that are not :class:`Markup` are escaped.

    A trailing underscore of an attribute name is dropped (``class_``), one inside becomes a hyphen.
    """
    inside = "".join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(clean(value))}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{named}>{inside}</{tag}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Several pieces of markup after each other."""
    return Markup("".join(parts))


def render_page(report: Report) -> str:
    """A whole HTML document."""
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"graphwright: {report.model}"),
        element("style", Markup(STYLE)),
    )
    page = element(
        "html", head, element("body", element("main", join(_sections(report)), class_="gw")), lang="en"
    )
    return f"<!doctype html>\n{page}\n"


def render_fragment(report: Report) -> str:
    """The same for a notebook cell: style and sections, no document around them."""
    return element("style", Markup(STYLE)) + element("div", join(_sections(report)), class_="gw")


def _sections(report: Report) -> Iterator[Markup]:
    yield _header(report)
    yield from _pictures(report)
    if rows := comparison_rows(report, details=False):
        more = comparison_rows(report)
        parts = element("details", element("summary", f"All {len(more)} quantities"), _comparison(more))
        yield _section("Predicted and measured", _comparison(rows) + (parts if len(more) > len(rows) else ""))
    if plans := plan_rows(report):
        exact = plans_are_exact(report, plans)
        yield _section("Plans, all exact" if exact else "Plans", _plans(plans, exact))
    if report.decisions:
        yield _section("Decisions", _decisions(report))
    if quality := report.measured.get("quality"):
        yield _section("Quality against the stock model", _facts(dict(flatten(quality))))
    if report.speculation:
        yield _section("Speculation", _facts(dict(flatten(report.speculation))))
    if report.kernels:
        yield _section("Kernels", _kernels(report))
    if title := compiled_title(report):
        yield _section(title, _compiled(report))
    if report.ops or report.near_misses:
        yield _section("What was found in the model", _found(report))
    if report.code_before or report.code_after:
        yield _section("Graphs", _code("Before", report.code_before) + _code("After", report.code_after))
    if report.costs:
        yield _section("Cost of a step", _costs(report))
    yield _footer(report)


def _header(report: Report) -> Markup:
    described = (
        ("Model", report.model),
        ("Target", report.target),
        ("Workload", workload_line(report.workload)),
    )
    terms = join(element("div", element("dt", name), element("dd", text or "-")) for name, text in described)
    facts = headlines(report)
    shown = join(element("div", element("dt", name), element("dd", text)) for name, text in facts)
    return element(
        "header",
        element("h1", "graphwright report"),
        element("dl", terms),
        *([element("dl", shown, class_="facts")] if facts else []),
    )


def _pictures(report: Report) -> Iterator[Markup]:
    """The plots in a grid, and what follows from them in words as its last cell."""
    from graphwright.optimizer.report_plots import draw_plots  # matplotlib is slow to import

    cells = [*map(_figure, draw_plots(report)), *_outlook(report)]
    if cells:
        yield element("div", join(cells), class_="plots")


def _figure(plot: Plot) -> Markup:
    legend = element(
        "ul",
        join(
            element("li", element("i", glyph, class_=color, aria_hidden="true"), name)
            for color, glyph, name in plot.legend
        ),
        class_="legend",
    )
    parts = [element("h2", plot.title), Markup(plot.svg), *([legend] if plot.legend else [])]
    return element("figure", *parts, element("figcaption", plot.caption))


def _section(title: str, content: str) -> Markup:
    return element("section", element("h2", title), Markup(content))


def _table(names: tuple[str, ...], rows: Iterator[Markup], kind: str) -> Markup:
    head = element("tr", join(element("th", name, scope="col") for name in names))
    table = element("table", element("thead", head), element("tbody", join(rows)), class_=kind)
    return element("div", table, class_="scroll")


def _cells(names: tuple[str, ...], values: tuple[str, ...], kind: str = "") -> Markup:
    """One row; each cell knows its column's name, which a phone shows in place of the head."""
    pairs = zip(names, values, strict=True)
    cells = join(element("td", value, data_name=name) for name, value in pairs)
    return element("tr", cells, class_=kind) if kind else element("tr", cells)


def _comparison(rows: list[Row]) -> Markup:
    """Predicted beside measured; the prediction alone where nothing was measured."""
    both = any(row.measured is not None for row in rows)
    names = ("", "predicted", "measured", "ratio")[: 4 if both else 2]

    def body() -> Iterator[Markup]:
        last = ""
        for row in rows:
            if row.section != last:
                head = element("th", label(row.section), scope="rowgroup", colspan=str(len(names)))
                yield element("tr", head)
                last = row.section
            values = (quantity(row.key, row.predicted), quantity(row.key, row.measured), row.ratio or "-")
            yield _cells(names, (label(row.key), *values)[: len(names)])

    return _table(names, body(), "numbers")


def _plans(plans: list[PlanRow], exact: bool) -> Markup:
    """Every plan, chosen first; columns that say nothing are left out."""
    keys = [
        key
        for key in ("seconds_per_token", "memory_bytes", *(() if exact else ("kl", "perplexity_ratio")))
        if any(plan.predicted.get(key) is not None or plan.measured.get(key) is not None for plan in plans)
    ]
    names = ("plan", "passes", *map(label, keys), "why")

    def body() -> Iterator[Markup]:
        for plan in plans:
            passes = join(element("code", name) for name in plan.passes)
            values: tuple[str, ...] = (str(plan.number), passes, *(_both(plan, key) for key in keys))
            status = element("strong" if plan.chosen else "span", plan.status)
            values += (element("div", status, f": {plan.reason}" if plan.reason else ""),)
            yield _cells(names, values, "chosen" if plan.chosen else "")

    return _table(names, body(), "wide plans")


def _both(plan: PlanRow, key: str) -> Markup:
    """The prediction, and below it the measurement where there is one."""
    predicted = element("span", quantity(key, plan.predicted.get(key)))
    if plan.measured.get(key) is None:
        return predicted
    return join([predicted, element("small", f"measured {quantity(key, plan.measured[key])}")])


def _outlook(report: Report) -> Iterator[Markup]:
    """What bounds the time, and where the choice would turn."""
    lines = bound_lines(report) + crossover_lines(report)
    if lines:
        items = join(element("li", element("strong", what), how) for what, how in lines)
        yield _section("Bound and crossovers", element("ul", items, class_="outlook"))


def _costs(report: Report) -> Markup:
    """The expressions of each phase, folded away."""
    note = element("p", "B sequences, C tokens of each in the cache before the step, T new tokens of each.")
    return join([note, *(_folded(f"{clean(name)} step", str(report.cost(name))) for name in report.costs)])


def _decisions(report: Report) -> Markup:
    names = ("pass", "sites", "status", "reason", "effect", "fidelity")

    def body() -> Iterator[Markup]:
        for group in group_decisions(report.decisions):
            first = group.first
            status = element("span", first.status.value, class_=f"status {_CLASS[first.status]}")
            sites: str = group.sites
            if len(group.decisions) > 1:
                listed = ", ".join(decision.site for decision in group.decisions)
                sites = element("details", element("summary", group.sites), listed)
            name = element("code", first.pass_name)
            yield _cells(names, (name, sites, status, first.reason, group.effect or "-", first.fidelity))

    return _table(names, body(), "wide")


def _kernels(report: Report) -> Markup:
    names = ("op", "provider", "nodes", "reason")
    rows = (
        _cells(names, (element("code", op), provider, str(count), reason or "-"))
        for op, provider, reason, count in kernel_counts(report)
    )
    return _table(names, rows, "wide")


def _compiled(report: Report) -> Markup:
    """Kernels for another machine, and the reason where there are none."""
    rows, note = compiled_rows(report), report.compiled.get("note", "")
    said = element("p", note) if note else Markup("")
    if not rows:
        return said
    return join([said, _table(COMPILED_COLUMNS, (_cells(COMPILED_COLUMNS, row) for row in rows), "wide")])


def _facts(facts: dict[str, object]) -> Markup:
    terms = (
        element("div", element("dt", label(key)), element("dd", quantity(key, value)))
        for key, value in facts.items()
    )
    return element("dl", join(terms))


def _found(report: Report) -> Markup:
    found = _facts(dict(report.ops))
    if not report.near_misses:
        return found
    misses = element("ul", join(element("li", miss) for miss in report.near_misses))
    return Markup(found + element("h3", "Near misses") + misses)


def _code(title: str, code: str) -> Markup:
    if not code:
        return Markup("")
    return _folded(f"{title}: {len(code.splitlines())} lines of Python", code)


def _folded(title: str, text: str) -> Markup:
    return element("details", element("summary", title), element("pre", element("code", text)))


def _footer(report: Report) -> Markup:
    versions = ", ".join(f"{label(key)} {value}" for key, value in report.versions.items())
    timing = timing_line(report)
    lines = [line for line in (f"Optimized in {timing}" if timing else "", versions) if line]
    return element("footer", join(element("p", line) for line in lines))


_CLASS = {
    Status.APPLIED: "good",
    Status.UNDONE: "warn",
    Status.FALLBACK: "warn",
    Status.ILLEGAL: "bad",
    Status.UNPROFITABLE: "calm",
    Status.NOT_FOUND: "dim",
}
