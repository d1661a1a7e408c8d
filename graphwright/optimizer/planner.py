"""The planner: which passes, for this workload, on this target, within this budget.

Without a list from the caller it prices every way to store the cache (keys and values, the minimum
cut, the cut with its projections absorbed), takes the fastest that fits the memory, and then asks
each further exact pass whether it pays. With a list it applies exactly that list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphwright.cost_model.estimate import estimate
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import BudgetError, PassError
from graphwright.ir.graph import Graph
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Pass, SiteRecord, order_passes, parse_pass
from graphwright.runtime.speculation.acceptance import measure_acceptance

#: Ways to give the program a cache, from which the fastest that fits is taken.
STORAGE_ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    ("place_cache{cut=kv}",),
    ("place_cache{cut=minimum}",),
    ("place_cache{cut=minimum}", "absorb_projections"),
)
_DRAFTER, _DRAFT_TOKENS = "ngram", 8


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        passes: the applied passes in order, as strings that parse back.
        target, workload, budget: what it was chosen for.
        seconds_per_token: predicted for decoding.
        memory_bytes: predicted at the workload's capacity.
    """

    passes: tuple[str, ...]
    target: str
    workload: Workload
    budget: Budget
    seconds_per_token: float
    memory_bytes: float

    def __str__(self) -> str:
        return f"[{', '.join(self.passes)}] for {self.target}"


@dataclass
class Planned:
    """A rewritten graph with the plan that made it and the decisions on the way."""

    graph: Graph
    plan: Plan
    decisions: list[Decision]
    predicted: dict[str, Any]
    baseline: dict[str, Any]
    runners_up: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What the planner plans for.

    Attributes:
        must_fit: refuse a plan that does not fit the memory, instead of saying so in the prediction.
    """

    target: Target
    workload: Workload
    budget: Budget
    max_positions: int | None
    must_fit: bool = True

    def estimate(self, graph: Graph) -> dict[str, Any]:
        """The predicted part of the report for a graph."""
        return estimate(
            graph, self.target, self.workload, budget=self.budget, max_positions=self.max_positions
        )

    @property
    def memory_limit(self) -> float:
        """Bytes that may be used: the target's memory, or less if the budget says so."""
        own = self.budget.memory_bytes
        return self.target.memory_bytes if own is None else min(own, self.target.memory_bytes)


def plan_given(graph: Graph, passes: Sequence[str | Pass], request: Request) -> Planned:
    """Apply the caller's passes, all of them.

    Raises:
        PassError: one of them cannot apply.
    """
    baseline = request.estimate(graph)
    decisions: list[Decision] = []
    applied = []
    for chosen in order_passes([parse_pass(p) for p in passes]):
        chosen = chosen.resolve(graph, request.workload, request.target, request.memory_limit)
        records = chosen(graph, request.workload, request.target, force=True)
        if not any(r.status == "applied" for r in records):
            reasons = "; ".join(sorted({f"{r.site}: {r.reason}" for r in records})[:3])
            raise PassError(
                f"{chosen} cannot apply: {reasons}", where="passes", hint="leave it out, or use passes=None"
            )
        applied.append(str(chosen))
        decisions += map(to_decision, records)
    return _planned(graph, applied, decisions, baseline, request)


def further_passes(calibration: Sequence[Any] | None) -> list[str]:
    """Exact passes that are asked one by one, in this order, whether they pay.

    Drafts are priced with the acceptance measured on the calibration text, if there is one.
    """
    speculate = f"speculate{{drafter={_DRAFTER}}}"
    if calibration:
        rows = [[int(token) for token in row] for row in calibration]
        measured = measure_acceptance(_DRAFTER, rows, _DRAFT_TOKENS)
        speculate = f"speculate{{drafter={_DRAFTER},acceptance={measured:.3f}}}"
    return ["compile_layers", speculate]


def plan_exact(graph: Graph, request: Request, calibration: Sequence[Any] | None = None) -> Planned:
    """Choose among the exact passes.

    Args:
        graph: the canonical graph; stays as it is.
        request: what is planned for.
        calibration: token sequences to measure acceptance on.

    Raises:
        BudgetError: nothing fits the memory or the latency; names the closest plan.
    """
    baseline = request.estimate(graph)
    options = [o for o in (_storage_option(graph, names, request) for names in STORAGE_ALTERNATIVES) if o]
    best = min(options, key=lambda o: o.rank(request))
    decisions = best.decisions + [d for o in options if o is not best for d in o.as_refused(best)]
    _check_memory(best, request)
    applied = list(best.applied)
    for text in further_passes(calibration):
        chosen = parse_pass(text)
        chosen = chosen.resolve(best.graph, request.workload, request.target, request.memory_limit)
        records = chosen(best.graph, request.workload, request.target)
        decisions += map(to_decision, records)
        if any(r.status == "applied" for r in records):
            applied.append(str(chosen))
    planned = _planned(best.graph, applied, decisions, baseline, request)
    planned.runners_up = [o.summary() for o in options if o is not best]
    _check_latency(planned, request)
    return planned


# --- storage -------------------------------------------------------------------------------------


@dataclass
class _Option:
    """One way to give the program a cache, tried on a copy of the graph."""

    graph: Graph
    applied: list[str]
    decisions: list[Decision]
    predicted: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.predicted["decode"]["seconds_per_token"])

    @property
    def memory(self) -> float:
        return float(self.predicted["memory"]["total_bytes"])

    def rank(self, request: Request) -> tuple[bool, float, float]:
        """Those that fit first, the fastest of them first; of those that do not fit, the smallest."""
        fits = self.memory <= request.memory_limit
        return (not fits, self.seconds if fits else self.memory, self.memory)

    def summary(self) -> dict[str, Any]:
        return {
            "passes": list(self.applied),
            "seconds_per_token": self.seconds,
            "memory_bytes": self.memory,
        }

    def as_refused(self, best: _Option) -> list[Decision]:
        """Why this option lost, as one decision for its last pass."""
        reason = (
            f"{self.seconds * 1e3:.3g} ms a token and {self.memory / 1e6:.0f} MB, against "
            f"{best.seconds * 1e3:.3g} ms and {best.memory / 1e6:.0f} MB with {' and '.join(best.applied)}"
        )
        predicted = {
            "seconds_per_token": self.seconds - best.seconds,
            "memory_bytes": self.memory - best.memory,
        }
        return [Decision(self.applied[-1], "", Status.UNPROFITABLE, reason, predicted, None, "exact")]


def _storage_option(graph: Graph, names: Sequence[str], request: Request) -> _Option | None:
    """The graph with one storage alternative; None if it is the same as a simpler one."""
    trial = graph.copy()
    applied: list[str] = []
    decisions: list[Decision] = []
    for name in names:
        chosen = parse_pass(name)
        if name == "place_cache{cut=minimum}" and not _saves_elements(chosen, trial):
            return None
        records = chosen(trial, request.workload, request.target, force=True)
        decisions += map(to_decision, records)
        if not any(r.status == "applied" for r in records):
            return None
        applied.append(str(chosen))
    return _Option(trial, applied, decisions, request.estimate(trial))


def _saves_elements(place: Pass, graph: Graph) -> bool:
    return any(
        not site.info["minimum"].is_keys_and_values for site in place.find(graph) if "minimum" in site.info
    )


# --- results -------------------------------------------------------------------------------------


def to_decision(record: SiteRecord) -> Decision:
    """A pass's record as a line of the report."""
    return Decision(
        record.pass_string,
        "" if record.site == "program" else record.site,
        Status(record.status),
        record.reason,
        record.predicted,
        None,
        record.fidelity,
    )


def _planned(
    graph: Graph, applied: list[str], decisions: list[Decision], baseline: dict[str, Any], request: Request
) -> Planned:
    predicted = request.estimate(graph)
    plan = Plan(
        tuple(applied),
        request.target.name,
        request.workload,
        request.budget,
        float(predicted["decode"]["seconds_per_token"]),
        float(predicted["memory"]["total_bytes"]),
    )
    return Planned(graph, plan, decisions, predicted, baseline)


def _check_memory(best: _Option, request: Request) -> None:
    if request.must_fit and best.memory > request.memory_limit:
        raise BudgetError(
            f"no plan fits: the smallest needs {best.memory / 2**30:.3g} GiB, the limit is "
            f"{request.memory_limit / 2**30:.3g} GiB",
            where=f"{request.target.name}, {request.workload}",
            hint=f"the closest plan is {best.applied}; shorten the workload or raise the limit",
        )


def _check_latency(planned: Planned, request: Request) -> None:
    wanted = request.budget.latency
    if wanted is not None and planned.plan.seconds_per_token > wanted:
        raise BudgetError(
            f"no plan is fast enough: {planned.plan.seconds_per_token * 1e3:.3g} ms a token predicted, "
            f"{wanted * 1e3:.3g} ms asked for",
            where=f"{request.target.name}, {request.workload}",
            hint=f"the closest plan is {list(planned.plan.passes)}; shorten the context",
        )
