"""The report as text for a terminal, drawn with rich; 100 columns wide, readable at 80."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from graphwright.optimizer.quantities import clean, combined, duration, label, ordered_keys, quantity
from graphwright.optimizer.report import Decision, Status

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

STATUS_STYLE = {
    Status.APPLIED: "green",
    Status.UNDONE: "yellow",
    Status.FALLBACK: "yellow",
    Status.ILLEGAL: "red",
    Status.UNPROFITABLE: "cyan",
    Status.NOT_FOUND: "dim",
}
_APART = frozenset({"quality", "seconds"})  # sections with a place of their own
_DETAIL = re.compile(r"_by_|^(compute|memory|launch)_seconds$|^(launches|flops|limit_bytes)$")


@dataclass(frozen=True)
class DecisionGroup:
    """Decisions that differ in nothing but their site, shown as one row."""

    decisions: tuple[Decision, ...]

    @property
    def first(self) -> Decision:
        return self.decisions[0]

    @property
    def sites(self) -> str:
        if len(self.decisions) > 1:
            return f"{len(self.decisions)} sites"
        return clean(self.first.site) or "program"

    @property
    def effect(self) -> str:
        """What changes: ``time per token: predicted -3 ms, measured -3.6 ms; memory: predicted 1 MiB``."""
        keys = ordered_keys([*(d.predicted for d in self.decisions), *(d.measured for d in self.decisions)])
        return "; ".join(filter(None, map(self._one_effect, keys)))

    def _one_effect(self, key: str) -> str:
        predicted = combined((decision.predicted for decision in self.decisions), key)
        measured = combined((decision.measured for decision in self.decisions), key)
        parts = [f"predicted {predicted}" if predicted else "", f"measured {measured}" if measured else ""]
        text = ", ".join(part for part in parts if part)
        return f"{label(key)}: {text}" if text else ""


@dataclass(frozen=True)
class Row:
    """One quantity, predicted beside measured."""

    section: str
    key: str
    predicted: Any
    measured: Any

    @property
    def ratio(self) -> str:
        """Measured over predicted, where both are numbers."""
        numbers = [value for value in (self.predicted, self.measured) if _is_number(value)]
        if len(numbers) < 2 or not self.predicted:
            return ""
        return f"{self.measured / self.predicted:.2f}"


def group_decisions(decisions: Iterable[Decision]) -> list[DecisionGroup]:
    """Join the decisions that differ in their site only; first seen, first shown."""
    groups: dict[tuple[str, Status, str, str], list[Decision]] = {}
    for decision in decisions:
        key = (decision.pass_name, decision.status, decision.reason, decision.fidelity)
        groups.setdefault(key, []).append(decision)
    return [DecisionGroup(tuple(members)) for members in groups.values()]


def comparison_rows(report: Report, *, details: bool = True) -> list[Row]:
    """Every quantity of ``predicted`` and ``measured``, side by side, in their order.

    Args:
        details: False leaves out what a first look does not need: the parts that a time is made of.
    """
    sections = [name for name in {**report.predicted, **report.measured} if name not in _APART]
    rows = []
    for section in sections:
        predicted = dict(flatten(report.predicted.get(section)))
        measured = dict(flatten(report.measured.get(section)))
        for key in {**predicted, **measured}:
            if details or not _DETAIL.search(key):
                rows.append(Row(section, key, predicted.get(key), measured.get(key)))
    return rows


def workload_line(workload: Mapping[str, Any]) -> str:
    """``batch 1, prompt 256, generate 64``; a shared prefix only where there is one."""
    shown = {key: value for key, value in workload.items() if value or key == "batch"}
    return ", ".join(f"{label(key)} {quantity(key, value)}" for key, value in shown.items())


def kernel_counts(report: Report) -> list[tuple[str, str, str, int]]:
    """``(op, provider, reason, how often)`` for each distinct choice of a kernel."""
    counts: dict[tuple[str, str, str], int] = {}
    for kernel in report.kernels:
        key = (kernel.get("op", ""), kernel.get("provider", ""), kernel.get("reason", ""))
        counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in counts.items()]


def timing_line(report: Report) -> str:
    """How long optimizing took, in all and by step; empty if it was not measured."""
    seconds = {k: v for k, v in (report.measured.get("seconds") or {}).items() if _is_number(v)}
    total = seconds.pop("total", sum(seconds.values()))
    if not total:
        return ""
    steps = ", ".join(f"{label(name)} {duration(value)}" for name, value in seconds.items() if value >= 0.05)
    return f"{duration(total)}" + (f": {steps}" if steps else "")


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
    if report.decisions:
        yield _decisions(report.decisions)
    if quality := report.measured.get("quality"):
        yield _facts("Quality against the stock model", quality)
    if report.speculation:
        yield _facts("Speculation", report.speculation)
    if report.kernels:
        yield _kernels(report)
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


def _kernels(report: Report) -> Table:
    table = _table("Kernels")
    table.add_column("op", ratio=3, overflow="fold")
    table.add_column("provider", no_wrap=True)
    table.add_column("nodes", no_wrap=True, justify="right")
    table.add_column("reason", ratio=5, overflow="fold")
    for op, provider, reason, count in kernel_counts(report):
        table.add_row(Text(clean(op)), Text(clean(provider)), str(count), Text(clean(reason)))
    return table


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


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as ``(key, number)`` pairs; a bare value counts under an empty key."""
    if values is None:
        return
    if not isinstance(values, Mapping):
        yield prefix, ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else values
        return
    for key, value in values.items():
        yield from flatten(value, f"{prefix}_{key}" if prefix else str(key))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
