"""The report as one HTML page: no scripts, no fonts or images from elsewhere, works offline.

Every text goes through :func:`element`, which escapes it; nothing else writes markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from graphwright.optimizer.quantities import clean, label, quantity
from graphwright.optimizer.report import Status
from graphwright.optimizer.report_text import (
    Row,
    comparison_rows,
    flatten,
    group_decisions,
    kernel_counts,
    timing_line,
    workload_line,
)

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """``<tag attributes>children</tag>``; children that are not :class:`Markup` are escaped.

    A trailing underscore of an attribute name is dropped (``class_``).
    """
    inside = "".join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    named = "".join(f' {name.rstrip("_")}="{escape(clean(value))}"' for name, value in attributes.items())
    return Markup(f"<{tag}{named}>{inside}</{tag}>")


def join(parts: Iterator[Markup]) -> Markup:
    """Several pieces of markup after each other."""
    return Markup("".join(parts))


def render_page(report: Report) -> str:
    """A whole HTML document."""
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"graphwright: {report.model}"),
        element("style", Markup(_STYLE)),
    )
    page = element(
        "html", head, element("body", element("main", join(_sections(report)), class_="gw")), lang="en"
    )
    return f"<!doctype html>\n{page}\n"


def render_fragment(report: Report) -> str:
    """The same for a notebook cell: style and sections, no document around them."""
    return element("style", Markup(_STYLE)) + element("div", join(_sections(report)), class_="gw")


def _sections(report: Report) -> Iterator[Markup]:
    yield _header(report)
    if rows := comparison_rows(report):
        yield _section("Predicted and measured", _comparison(rows))
    if report.decisions:
        yield _section("Decisions", _decisions(report))
    if quality := report.measured.get("quality"):
        yield _section("Quality against the stock model", _facts(dict(flatten(quality))))
    if report.speculation:
        yield _section("Speculation", _facts(dict(flatten(report.speculation))))
    if report.kernels:
        yield _section("Kernels", _kernels(report))
    if report.ops or report.near_misses:
        yield _section("What was found in the model", _found(report))
    if report.code_before or report.code_after:
        yield _section("Graphs", _code("Before", report.code_before) + _code("After", report.code_after))
    yield _footer(report)


def _header(report: Report) -> Markup:
    facts = (("Model", report.model), ("Target", report.target), ("Workload", workload_line(report.workload)))
    terms = join(element("div", element("dt", name), element("dd", text or "-")) for name, text in facts)
    return element("header", element("h1", "graphwright report"), element("dl", terms))


def _section(title: str, content: str) -> Markup:
    return element("section", element("h2", title), Markup(content))


def _table(names: tuple[str, ...], rows: Iterator[Markup], kind: str) -> Markup:
    head = element("tr", join(element("th", name, scope="col") for name in names))
    table = element("table", element("thead", head), element("tbody", join(rows)), class_=kind)
    return element("div", table, class_="scroll")


def _cells(names: tuple[str, ...], values: tuple[str, ...]) -> Markup:
    """One row; each cell knows its column's name, which a phone shows in place of the head."""
    pairs = zip(names, values, strict=True)
    return element("tr", join(element("td", value, **{"data-name": name}) for name, value in pairs))


def _comparison(rows: list[Row]) -> Markup:
    names = ("", "predicted", "measured", "ratio")

    def body() -> Iterator[Markup]:
        last = ""
        for row in rows:
            if row.section != last:
                yield element("tr", element("th", label(row.section), scope="rowgroup", colspan="4"))
                last = row.section
            values = (quantity(row.key, row.predicted), quantity(row.key, row.measured), row.ratio or "-")
            yield _cells(names, (label(row.key), *values))

    return _table(names, body(), "numbers")


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
    lines = f"{title}: {len(code.splitlines())} lines of Python"
    return element("details", element("summary", lines), element("pre", element("code", code)))


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

_STYLE = """
.gw { --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --paper: #fff; --wash: #f5f7f9;
  --good: #116329; --warn: #7d4e00; --bad: #a40e26; --calm: #0550ae;
  max-width: 72rem; margin: 0 auto; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; box-sizing: border-box; }
@media (prefers-color-scheme: dark) {
  body:has(> main.gw) { background: #12161b; }
  main.gw { --ink: #e6eaef; --soft: #9aa5b1; --line: #333c46; --paper: #12161b; --wash: #1b2128;
    --good: #57c477; --warn: #e0a63a; --bad: #ff7b82; --calm: #79b4ff; } }
body:has(> main.gw) { margin: 0; }
.gw h1 { font-size: 1.5rem; margin: .2rem 0 .8rem; }
.gw h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.gw h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.gw dl { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 0; }
.gw dt { color: var(--soft); font-size: .85rem; }
.gw dd { margin: 0; overflow-wrap: anywhere; }
.gw .scroll { overflow-x: auto; }
.gw table { border-collapse: collapse; width: 100%; }
.gw th, .gw td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); }
.gw thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
.gw th[scope=rowgroup] { background: var(--wash); }
.gw .numbers td + td, .gw .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; }
.gw code, .gw pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
.gw td code { overflow-wrap: anywhere; display: inline-block; min-width: 11em; }
.gw .numbers td + td { white-space: nowrap; }
.gw pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; padding: .8rem;
  overflow-x: auto; max-height: 32rem; }
.gw summary { cursor: pointer; }
.gw .status { white-space: nowrap; font-weight: 600; }
.gw .good { color: var(--good); } .gw .warn { color: var(--warn); } .gw .bad { color: var(--bad); }
.gw .calm { color: var(--calm); } .gw .dim { color: var(--soft); }
.gw footer { margin-top: 2rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) {
  .gw .wide thead { display: none; }
  .gw .wide tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .gw .wide td { display: block; border: 0; padding: .1rem 0; }
  .gw .wide td::before { content: attr(data-name) ": "; color: var(--soft); font-size: .85rem; }
  .gw .wide td details { display: inline-block; vertical-align: top; } }
"""
