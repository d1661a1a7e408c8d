"""Machines side by side: one model, one workload, one row for each target.

The graph is captured once and planned for every target. A target that no plan fits is a row that says
why, and the others are planned all the same.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import BudgetError, InputError
from graphwright.optimizer.describe import model_line
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.quantities import quantity
from graphwright.optimizer.report import Report
from graphwright.optimizer.what_if import Captured, capture_without_weights, find_machine, plan_captured

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "graphwright.comparison/1"


@dataclass(frozen=True)
class Row:
    """One target.

    Args:
        target, title: the machine's name, and what its vendor calls it.
        fits: whether the workload fits the memory that may be used; None if the budget allows no plan.
        reason: why it does not fit, or what else stands against it; empty if nothing does.
        tokens_per_second: decoded, of all sequences together.
        bound: what takes most of a decode step: ``memory``, ``compute`` or ``launches``.
        seconds_per_token: one decode step at the workload's mean context.
        prefill_seconds: the prompt of every sequence.
        memory_bytes, limit_bytes: weights, cache and workspace, and what they may take.
        largest_batch: sequences of the workload's length that fit.
        largest_context: tokens per sequence that fit at the workload's batch; None if nothing bounds it.
        passes: what the planner chose, in order.
    """

    target: str
    title: str
    fits: bool | None = None
    reason: str = ""
    tokens_per_second: float | None = None
    bound: str = ""
    seconds_per_token: float | None = None
    prefill_seconds: float | None = None
    memory_bytes: float | None = None
    limit_bytes: float | None = None
    largest_batch: int | None = None
    largest_context: int | None = None
    passes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: the rows in the order asked for, and the reports behind them.

    Args:
        model: its class, size and dtype.
        workload: ``batch``, ``prompt``, ``generate``, ``shared_prefix``.
        rows: one for each target.
        reports: by the target's name; targets without a plan have none.
    """

    model: str
    workload: dict[str, Any]
    rows: tuple[Row, ...]
    reports: dict[str, Report] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``schema``, ``model``, ``workload``, ``rows``, and ``reports`` in the rows' order."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "workload": dict(self.workload),
            "rows": [{**asdict(row), "passes": list(row.passes)} for row in self.rows],
            "reports": [report.to_dict() for report in self.reports.values()],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text; characters beyond ASCII are escaped."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_text(self, width: int = 100) -> str:
        """The table, what stands against a target, and the plans, as text of at most ``width`` columns."""
        from graphwright.optimizer.compare_text import render_text

        return render_text(self, width=width)

    def to_html(self) -> str:
        """One self-contained HTML page that works offline."""
        from graphwright.optimizer.compare_html import render_page

        return render_page(self)

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> RenderableType:
        from graphwright.optimizer.compare_text import renderable

        return renderable(self)


def compare(
    model_or_config: Any,
    targets: Sequence[str | Target],
    *,
    workload: Workload | None = None,
    budget: Budget | None = None,
) -> Comparison:
    """Plan one model for several machines.

    Args:
        model_or_config: as for :func:`graphwright.plan`.
        targets: names or targets, each once.
        workload, budget: as for :func:`graphwright.plan`; the budget holds on every target.

    Raises:
        GraphwrightError: no such target, one that is named twice, or an unsupported model. A budget that
            no plan meets on a target is not an error: it is what that target's row says.
    """
    _check_targets(targets)
    workload = workload or Workload()
    progress = Progress()
    machines = [find_machine(target, progress) for target in targets]
    captured = capture_without_weights(model_or_config, progress)
    rows, reports = [], {}
    for machine in machines:
        row, report = _plan_row(captured, machine, workload, budget, progress)
        rows.append(row)
        if report is not None:
            reports[machine.name] = report
    return Comparison(model_line(captured.model), asdict(workload), tuple(rows), reports)


def _check_targets(targets: Sequence[str | Target]) -> None:
    """Refuse names before anything is measured or captured: a typing error is told at once."""
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise InputError(
            "no targets to compare" if not targets else f"{targets!r} is not a list of targets",
            where="compare(targets=...)",
            hint='pass names, e.g. ["h100", "h200"]; graphwright.targets() lists them',
        )
    found: dict[str, str | Target] = {}
    for given in targets:
        name = resolve_target(given).name
        if name in found:
            raise InputError(
                f"{name} is named twice: as {str(found[name])!r} and as {str(given)!r}",
                where="compare(targets=...)",
                hint="name each target once",
            )
        found[name] = given


def _plan_row(
    captured: Captured, machine: Target, workload: Workload, budget: Budget | None, progress: Progress
) -> tuple[Row, Report | None]:
    try:
        report = plan_captured(captured, machine, workload, budget, progress)
    except BudgetError as error:
        return Row(machine.name, machine.title, reason=error.what), None
    decode, memory = report.predicted["decode"], report.predicted["memory"]
    row = Row(
        target=machine.name,
        title=machine.title,
        fits=bool(memory["fits"]),
        reason=_objection(memory, workload),
        tokens_per_second=decode["tokens_per_second"],
        bound=decode["bound"],
        seconds_per_token=decode["seconds_per_token"],
        prefill_seconds=report.predicted["prefill"]["seconds"],
        memory_bytes=memory["total_bytes"],
        limit_bytes=memory["limit_bytes"],
        largest_batch=memory["largest_batch"],
        largest_context=memory["largest_context"],
        passes=next(tuple(plan["passes"]) for plan in report.plans if plan["status"] == "chosen"),
    )
    return row, report


def _objection(memory: dict[str, Any], workload: Workload) -> str:
    """Why the workload does not fit, in one sentence; empty if it does."""
    limit, longest = quantity("bytes", memory["limit_bytes"]), memory["largest_context"]
    if memory["fits"]:
        # More than the largest context although the memory suffices: the model's positions end there.
        beyond = longest is not None and workload.capacity > longest
        return f"{workload.capacity:,} tokens, but the model's positions end at {longest:,}" if beyond else ""
    if memory["weights_bytes"] > memory["limit_bytes"]:
        return f"the weights alone take {quantity('bytes', memory['weights_bytes'])} of {limit}"
    room = f"; {longest:,} tokens would fit" if longest else ""
    return f"{quantity('bytes', memory['total_bytes'])} needed of {limit}{room}"
