"""What every view of a report shows, in rows: decisions joined, quantities paired, plans in order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphwright.optimizer.plain_data import number
from graphwright.optimizer.quantities import clean, combined, count, duration, label, ordered_keys, quantity
from graphwright.optimizer.report import Decision, Status

if TYPE_CHECKING:
    from graphwright.optimizer.report import Report

_APART = frozenset({"quality", "seconds"})  # sections with a place of their own
_DETAIL = re.compile(r"_by_|^(compute|memory|launch)_seconds$|^(launches|flops|limit_bytes|bound)$")


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
class PlanRow:
    """One plan of the front or a runner-up.

    Attributes:
        number: 1 is the chosen plan; the others follow, fastest first.
        passes: its pass strings.
        status: ``chosen``, ``runner-up`` or ``undone``.
        reason: why it was chosen or not.
        predicted, measured: ``seconds_per_token``, ``memory_bytes``, ``kl``, ``perplexity_ratio``.
        changes: how it differs from the chosen plan: ``+ compile_layers``, ``- skip_layers{set=3}``.
    """

    number: int
    passes: tuple[str, ...]
    status: str
    reason: str
    predicted: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()

    @property
    def chosen(self) -> bool:
        return self.status == "chosen"

    def value(self, key: str) -> str:
        """``7.1 ms``, or ``7.1 ms, measured 7.8 ms`` where it was measured."""
        predicted, measured = self.predicted.get(key), self.measured.get(key)
        if measured is None:
            return quantity(key, predicted)
        return f"{quantity(key, predicted)}, measured {quantity(key, measured)}"


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
        predicted, measured = number(self.predicted), number(self.measured)
        return f"{measured / predicted:.2f}" if predicted and measured is not None else ""


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


def plan_rows(report: Report) -> list[PlanRow]:
    """The chosen plan, then the others by their predicted time per token."""

    def rank(plan: Mapping[str, Any]) -> tuple[bool, float]:
        seconds = number((plan.get("predicted") or {}).get("seconds_per_token"))
        return (plan.get("status") != "chosen", float("inf") if seconds is None else seconds)

    ranked = sorted(report.plans, key=rank)
    chosen = next((plan["passes"] for plan in ranked if plan.get("status") == "chosen"), None)
    return [
        PlanRow(
            index,
            tuple(map(clean, plan.get("passes") or ("no passes",))),
            clean(plan.get("status") or "-"),
            clean(plan.get("reason") or ""),
            plan.get("predicted") or {},
            plan.get("measured") or {},
            _changes(plan.get("passes") or (), chosen),
        )
        for index, plan in enumerate(ranked, start=1)
    ]


def _changes(passes: Sequence[str], chosen: Sequence[str] | None) -> tuple[str, ...]:
    if chosen is None:
        return ()
    added = [f"+ {clean(name)}" for name in passes if name not in chosen]
    return (*added, *(f"- {clean(name)}" for name in chosen if name not in passes))


def plans_are_exact(report: Report, plans: Iterable[PlanRow]) -> bool:
    """Whether no plan is predicted or measured to lose quality, nor holds a pass that may."""
    if any(d.fidelity == "lossy" and d.status is Status.APPLIED for d in report.decisions):
        return False
    values = (side.get("kl") for plan in plans for side in (plan.predicted, plan.measured))
    return not any(number(value) for value in values)


def crossover_lines(report: Report) -> list[tuple[str, str]]:
    """``("speculation stops paying", " at batch 12: its note")``; where, if the note does not say it."""
    lines = []
    for crossover in report.crossovers:
        value, name = number(crossover.get("value")), clean(crossover.get("quantity") or "quantity")
        where = f" at no {name}" if value is None else f" at {name} {count(value)}"
        note = clean(crossover.get("note") or "")
        if note and (value is None or count(value) in note):
            where = ""
        lines.append((clean(crossover.get("what") or "-"), where + (f": {note}" if note else "")))
    return lines


def bound_lines(report: Report) -> list[tuple[str, str]]:
    """``("decode", " is bound by memory: memory 5 ms, compute 1 ms")`` for each phase."""
    lines = []
    for phase in ("decode", "prefill"):
        predicted = report.predicted.get(phase) or {}
        bound = predicted.get("bound")
        if not isinstance(bound, str):
            continue
        times = ", ".join(
            f"{name} {duration(seconds)}"
            for name, key in (("memory", "memory"), ("compute", "compute"), ("launches", "launch"))
            if (seconds := number(predicted.get(f"{key}_seconds"))) is not None
        )
        lines.append((phase, f" is bound by {clean(bound)}" + (f": {times}" if times else "")))
    return lines


def workload_line(workload: Mapping[str, Any]) -> str:
    """``batch 1, prompt 256, generate 64``; a shared prefix only where there is one."""
    shown = {key: value for key, value in workload.items() if value or key == "batch"}
    return ", ".join(f"{label(key)} {quantity(key, value)}" for key, value in shown.items())


def headlines(report: Report) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first, measured where they were."""
    facts = []
    for name, section, key in (
        ("Time per token", "decode", "seconds_per_token"),
        ("Tokens/s", "decode", "tokens_per_second"),
        ("Faster than stock", "speedup", "ratio"),
        ("Memory", "memory", "total_bytes"),
        ("KL to the stock model", "quality", "mean_kl"),
    ):
        for side, word in ((report.measured, "measured"), (report.predicted, "predicted")):
            value = number((side.get(section) or {}).get(key))
            if value is not None:
                facts.append((f"{name}, {word}", quantity(key, value)))
                break
    return facts


def kernel_counts(report: Report) -> list[tuple[str, str, str, int]]:
    """``(op, provider, reason, how often)`` for each distinct choice of a kernel."""
    counts: dict[tuple[str, str, str], int] = {}
    for kernel in report.kernels:
        key = (kernel.get("op", ""), kernel.get("provider", ""), kernel.get("reason", ""))
        counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in counts.items()]


#: The columns of the kernels compiled for another machine.
COMPILED_COLUMNS = ("kernel", "for", "registers", "spilled", "shared", "warps", "binary")


def compiled_title(report: Report) -> str:
    """``Kernels compiled for h100 (sm_90, Triton 3.9.0)``; empty where there is nothing to say."""
    about = report.compiled
    if not about:
        return ""
    by = f", Triton {clean(about['triton'])}" if about.get("triton") else ""
    return f"Kernels compiled for {clean(about.get('target', ''))} ({clean(about.get('arch', ''))}{by})"


def compiled_rows(report: Report) -> list[tuple[str, ...]]:
    """The kernels compiled for another machine, a row each; one that failed says why."""
    rows: list[tuple[str, ...]] = []
    for kernel in report.compiled.get("kernels", ()):
        name, ops, error = (clean(kernel[key]) for key in ("label", "ops", "error"))
        sizes = [quantity(key, kernel[key]) for key in ("spill_bytes", "shared_bytes", "binary_bytes")]
        counts = [count(kernel[key]) for key in ("registers", "num_warps")]
        numbers = (counts[0], sizes[0], sizes[1], counts[1], sizes[2])
        rows.append((name, f"{ops}: {error}" if error else ops, *numbers))
    return rows


def timing_line(report: Report) -> str:
    """How long optimizing took, in all and by step; empty if it was not measured."""
    seconds = {k: v for k, v in (report.measured.get("seconds") or {}).items() if number(v) is not None}
    total = seconds.pop("total", sum(seconds.values()))
    if not total:
        return ""
    steps = ", ".join(f"{label(name)} {duration(value)}" for name, value in seconds.items() if value >= 0.05)
    return f"{duration(total)}" + (f": {steps}" if steps else "")


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested dictionaries as ``(key, number)`` pairs; a bare value counts under an empty key."""
    if values is None:
        return
    if not isinstance(values, Mapping):
        yield prefix, ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else values
        return
    for key, value in values.items():
        yield from flatten(value, f"{prefix}_{key}" if prefix else str(key))
