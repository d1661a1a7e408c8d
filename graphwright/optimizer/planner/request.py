"""What the planner is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphwright.cost_model.estimate import estimate
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.graph import Graph
from graphwright.optimizer.choice import Bounds
from graphwright.optimizer.draft_program import DraftGraph
from graphwright.optimizer.quality import Sensitivity
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Pass, SiteRecord

#: Measures lossy passes at the sites of an exact graph: by (site, pass string), what each loses.
MeasureLoss = Callable[[Graph, Sequence[Pass]], Mapping[tuple[str, str], Sensitivity]]


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        passes: the applied passes in order, as strings that parse back.
        target, workload, budget: what it was chosen for.
        seconds_per_token: predicted for decoding.
        memory_bytes: predicted at the workload's capacity.
        kl: predicted loss in nats per token; 0 for exact programs.
        perplexity_ratio: predicted; 1 for exact programs.
    """

    passes: tuple[str, ...]
    target: str
    workload: Workload
    budget: Budget
    seconds_per_token: float
    memory_bytes: float
    kl: float = 0.0
    perplexity_ratio: float = 1.0

    def __str__(self) -> str:
        return f"[{', '.join(self.passes)}] for {self.target}"


@dataclass(frozen=True)
class Candidate:
    """A plan that was priced, chosen or not.

    Attributes:
        passes: in order, as strings that parse back.
        seconds_per_token, memory_bytes, kl, perplexity_ratio: predicted.
        reason: why it was chosen, or why not.
        step_seconds: predicted for a step of one token: without drafts.
    """

    passes: tuple[str, ...]
    seconds_per_token: float
    memory_bytes: float
    kl: float
    perplexity_ratio: float
    reason: str
    step_seconds: float

    def as_row(self, status: str, measured: dict[str, float] | None = None) -> dict[str, Any]:
        """A line of the report's plans."""
        return {
            "passes": list(self.passes),
            "status": status,
            "reason": self.reason,
            "predicted": {
                "seconds_per_token": self.seconds_per_token,
                "memory_bytes": self.memory_bytes,
                "kl": self.kl,
                "perplexity_ratio": self.perplexity_ratio,
            },
            "measured": measured,
        }


@dataclass
class Planned:
    """A rewritten graph with the plan that made it and the decisions on the way.

    Attributes:
        graph: rewritten.
        plan: what was applied.
        decisions: every pass and site.
        predicted, baseline: of the rewritten graph and of the captured one.
        others: plans that were not chosen, fastest first: the front of plans and the runners-up.
        draft: the program that the plan drafts with, if it has one.
    """

    graph: Graph
    plan: Plan
    decisions: list[Decision]
    predicted: dict[str, Any]
    baseline: dict[str, Any]
    others: list[Candidate] = field(default_factory=list)
    draft: DraftGraph | None = None


@dataclass(frozen=True)
class Request:
    """What the planner plans for.

    Attributes:
        target, workload, budget: the caller's.
        max_positions: the model's.
        must_fit: refuse a plan that does not fit the memory, instead of saying so in the prediction.
        program_passes: program-wide passes to try besides their own variants, such as drafts at an
            acceptance that was measured; they replace the variants of the same name.
        measure_loss: measures what lossy passes lose; None where nothing can be measured.
        tighten: factor on the budget's bounds of quality, after a measurement exceeded them.
    """

    target: Target
    workload: Workload
    budget: Budget
    max_positions: int | None
    must_fit: bool = True
    program_passes: tuple[Pass, ...] = ()
    measure_loss: MeasureLoss | None = None
    tighten: float = 1.0

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

    @property
    def allows_loss(self) -> bool:
        """Whether lossy passes are tried: a measurement may have left nothing of the budget."""
        return self.budget.allows_loss and self.tighten > 0

    @property
    def bounds(self) -> Bounds:
        """The budget for the choice; without a bound on quality nothing may be lost."""
        kl, perplexity = self.budget.kl, self.budget.perplexity
        if not self.allows_loss:
            kl, perplexity = 0.0, None
        return Bounds(
            memory_bytes=self.memory_limit,
            seconds_per_token=self.budget.latency,
            kl=None if kl is None else kl * self.tighten,
            perplexity=None if perplexity is None else float(perplexity**self.tighten),
        )


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
