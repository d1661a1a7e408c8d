"""The report as text for a terminal, drawn with rich; 100 columns wide, readable at 80."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graphwright.optimizer.quantities import clean, label, quantity
from graphwright.optimizer.report import Decision, Status
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
    kernel_counts,
    plan_rows,
    plans_are_exact,
    timing_line,
    workload_line,
)

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

# The text shows this many plans; the page and the JSON show all of them.
_MOST_PLANS = 6
STATUS_STYLE = {
    Status.APPLIED: "green",
    Status.UNDONE: "yellow",
    Status.FALLBACK: "yellow",
    Status.ILLEGAL: "red",
    Status.UNPROFITABLE: "cyan",
    Status.NOT_FOUND: "dim",
}


def renderable(report: Report) -> RenderableType:
    """The report as something a rich console prints."""
    return Group(*_parts(report))


def render_text(report: Report, *, width: int, color: bool) -> str:
    """The report as text, without escape sequences unless ``color``."""
    console = Console(
        file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None
    )
    with console.capture() as capture:
        console.print(renderable(report))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _parts(report: Report) -> Iterator[RenderableType]:
    yield Panel(
        Text.assemble(
            ("model     ", "dim"), f"{clean(report.model)}\n",
            ("target    ", "dim"), f"{clean(report.target)}\n",
            ("workload  ", "dim"), workload_line(report.workload) or "-",
        ),
        title="graphwright report",
        title_align="left",
        box=box.ROUNDED,
    )  # fmt: skip
    if rows := comparison_rows(report, details=False):
        yield _comparison(rows)
    if plans := plan_rows(report):
        yield _plans(plans, plans_are_exact(report, plans))
    yield from _outlook(report)
    if report.decisions:
        yield _decisions(report.decisions)
    if quality := report.measured.get("quality"):
        yield _facts("Quality against the stock model", quality)
    if report.speculation:
        yield _facts("Speculation", report.speculation)
    if report.kernels:
        yield _kernels(report)
    if title := compiled_title(report):
        yield _compiled(report, title)
    yield from _footer(report)


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        expand=True,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )


def _comparison(rows: list[Row]) -> Table:
    table = _table("Predicted and measured")
    table.add_column("", ratio=3)
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right", ratio=2)
    last = ""
    for row in rows:
        if row.section != last:
            table.add_row(Text(label(row.section), style="bold"), "", "", "")
            last = row.section
        cells = (quantity(row.key, row.predicted), quantity(row.key, row.measured), row.ratio)
        table.add_row(Text(f"  {label(row.key)}"), *(Text(cell) for cell in cells))
    return table


def _decisions(decisions: list[Decision]) -> Table:
    table = _table("Decisions")
    table.add_column("pass", ratio=3, overflow="fold")
    table.add_column("sites", max_width=13, overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("reason and effect", ratio=5, overflow="fold")
    for group in group_decisions(decisions):
        first = group.first
        reason = Text(clean(first.reason))
        if first.fidelity != "exact":
            reason.append(f" [{clean(first.fidelity)}]", style="dim")
        if group.effect:
            reason.append(f"\n{group.effect}", style="dim")
        status = Text(first.status.value, style=STATUS_STYLE[first.status])
        table.add_row(Text(clean(first.pass_name)), Text(group.sites), status, reason)
    return table


def _plans(plans: list[PlanRow], exact: bool) -> RenderableType:
    """The chosen plan and how the fastest of the others differ from it: quality against speed."""
    keys = ("seconds_per_token", "memory_bytes", *(() if exact else ("kl",)))
    table = _table("Plans, all exact" if exact else "Plans")
    table.padding = (0, 1, 0, 0)
    table.add_column("", no_wrap=True)
    table.add_column("passes, or what differs from the first", ratio=1, overflow="fold")
    for key in keys:
        table.add_column(label(key), justify="right", max_width=10)
    for plan in plans[:_MOST_PLANS]:
        # A name that is too long for a line is cut, not moved to the next, away from its sign.
        text = Text("\n".join(plan.changes or plan.passes).replace(" ", "\u00a0"))
        if note := ": ".join(filter(None, ("" if plan.chosen else plan.status, plan.reason))):
            text.append(f"\n{note}", style="dim")
        cells = (Text(plan.value(key).replace(", measured ", "\nmeasured\n")) for key in keys)
        table.add_row(Text(f"{'>' if plan.chosen else ' '}{plan.number}"), text, *cells)
    more = len(plans) - _MOST_PLANS
    if more <= 0:
        return table
    return Group(table, Text(f"{more} more in the HTML and JSON reports", style="dim"), Text(""))


def _outlook(report: Report) -> Iterator[RenderableType]:
    """What bounds the time, and where the choice would turn."""
    for title, lines in (("Bound", bound_lines(report)), ("Crossovers", crossover_lines(report))):
        if lines:
            yield Group(Text(title, style="bold"), *(Text(f"{what}{how}") for what, how in lines), Text(""))


def _kernels(report: Report) -> Table:
    table = _table("Kernels")
    table.add_column("op", ratio=3, overflow="fold")
    table.add_column("provider", no_wrap=True)
    table.add_column("nodes", no_wrap=True, justify="right")
    table.add_column("reason", ratio=5, overflow="fold")
    for op, provider, reason, count in kernel_counts(report):
        table.add_row(Text(clean(op)), Text(clean(provider)), str(count), Text(clean(reason)))
    return table


def _compiled(report: Report, title: str) -> RenderableType:
    """Kernels for another machine, and the reason where there are none."""
    note = Text(clean(report.compiled.get("note", "")))
    rows = compiled_rows(report)
    if not rows:
        return Group(Text(title, style="bold"), note, Text(""))
    table = _table(title)
    table.padding = (0, 1, 0, 0)
    for index, name in enumerate(COMPILED_COLUMNS):
        if index < 2:
            table.add_column(name, ratio=3, overflow="fold")
        else:
            table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return Group(table, note) if note else table


def _facts(title: str, facts: Mapping[str, Any]) -> RenderableType:
    text = Text()
    for number, (key, value) in enumerate(flatten(facts)):
        text.append(", " if number else "")
        text.append(f"{label(key)} ", style="dim")
        text.append(quantity(key, value))
    return Group(Text(title, style="bold"), text, Text(""))


def _footer(report: Report) -> Iterator[RenderableType]:
    for title, line in (
        ("Semantic ops", ", ".join(f"{clean(op)} {count}" for op, count in report.ops.items())),
        ("Near misses", "\n".join(clean(miss) for miss in report.near_misses)),
        ("Optimized in", timing_line(report)),
        ("Versions", ", ".join(f"{label(k)} {clean(v)}" for k, v in report.versions.items())),
    ):
        if line:
            yield Text.assemble((f"{title}: ", "dim"), line)
