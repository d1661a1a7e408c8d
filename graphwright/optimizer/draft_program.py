"""Draft programs: a second graph over the target's cache and weights, made of the target's by more passes.

The drafter names the passes (``Drafter.draft_passes``); here they are applied to a copy of the plan's graph,
which is priced, and lowered beside the target's (:mod:`graphwright.optimizer.build`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.speculation import drafting_seconds
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Workload
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph
from graphwright.optimizer.quantities import quantity
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Site, SiteRecord, parse_pass
from graphwright.passes.speculate import Speculate
from graphwright.runtime.lowering.kernels import KernelUse
from graphwright.runtime.speculation import Drafter, Speculation, make_speculation, parse_drafter

_WHERE = "speculate"


@dataclass(frozen=True)
class DraftGraph:
    """A draft program before it is lowered.

    Attributes:
        graph: reads the states of the target's graph; what it reads besides is written when tokens are
            committed.
        passes: that made it of the target's.
        reasons: what they did, in words.
    """

    graph: Graph
    passes: tuple[str, ...]
    reasons: tuple[str, ...]

    def seconds(self, drafts: int, workload: Workload, target: Target) -> float:
        """Predicted, of drafting a chain of so many tokens for all rows at the workload's mean context."""
        return drafting_seconds(
            graph_cost(self.graph), target, drafts, batch=workload.batch, context=workload.mean_context
        )

    def memory_bytes(self, graph: Graph, workload: Workload) -> int:
        """What it stores beside the cache of the target, whose graph is given."""
        own, shared = ({store.name: store for store in default_stores(g)} for g in (self.graph, graph))
        added = [store for name, store in own.items() if name not in shared]
        return cache_bytes(added, workload.batch, workload.capacity)


def speculation_of(graph: Graph) -> Speculation | None:
    """The drafter that the plan put into the graph's annotations."""
    chosen = graph.annotations.get("speculation")
    return None if chosen is None else make_speculation(chosen)


#: Implementations of attention that give a token of a tree the bits of its path as a chain.
_EXACT_IN_TREES = "cpp"


def rounded_trees(graph: Graph, kernels: Sequence[KernelUse]) -> Decision | None:
    """What a caller must know of trees where attention adds up a path in another order than in a chain."""
    speculation = speculation_of(graph)
    others = {
        use.provider for use in kernels if use.op.endswith("_attention") and use.provider != _EXACT_IN_TREES
    }
    if speculation is None or not speculation.makes_trees or not others:
        return None
    reason = (
        f"attention runs in {' and '.join(sorted(others))}, where sums follow the places of a tree's tokens: "
        "in half precision a near-tie may fall otherwise than without drafts; chains change nothing"
    )
    return Decision(_WHERE, "", Status.FALLBACK, reason, None, None, "reordered")


def draft_graph(
    graph: Graph, workload: Workload | None = None, target: Target | None = None
) -> DraftGraph | None:
    """The draft program of a plan's graph; None if its drafter needs none, or if it does not draft.

    Args:
        graph: of the target, rewritten; stays as it is.
        workload, target: what :attr:`DraftGraph.reasons` are priced for.

    Raises:
        PassError: the drafter's passes apply nowhere, or what they add to the cache is not written when
            tokens are committed.
    """
    if "speculation" not in graph.annotations:
        return None
    drafter = parse_drafter(graph.annotations["speculation"]["drafter"])
    passes = drafter.draft_passes()
    if not passes:
        return None
    workload, target = workload or Workload(), target or resolve_target("cpu")
    drafts = graph.copy()
    del drafts.annotations["speculation"]
    drafts.annotations["draft_passes"] = list(passes)
    reasons = []
    for text in passes:
        records = parse_pass(text)(drafts, workload, target, force=True, rollback=False)
        reasons.append(_applied(records, text, drafter))
    _check_states(graph, drafts, drafter)
    return DraftGraph(drafts, passes, tuple(reasons))


def _applied(records: list[SiteRecord], text: str, drafter: Drafter) -> str:
    """What a pass did where it applied, in words, and at how many sites.

    Raises:
        PassError: it did not.
    """
    applied = [record.reason for record in records if record.status == "applied"]
    if applied:
        return f"{text} at {len(applied)} of {len(records)} sites: {applied[0]}"
    refusals = sorted({f"{record.site}: {record.reason}" for record in records})
    raise PassError(
        f"{drafter} has no draft program here: {text} cannot apply: {'; '.join(refusals[:3])}",
        where=_WHERE,
        hint="change what stands in its way, or choose another drafter",
    )


def _check_states(graph: Graph, drafts: Graph, drafter: Drafter) -> None:
    """Refuse a draft whose own states would stay empty: the target does not run its steps."""
    held = {node.meta["name"] for node in graph.placeholders("state")}
    for node in drafts.placeholders("state"):
        if node.meta["name"] not in held and node.meta.get("store", {}).get("role") != "summary":
            raise PassError(
                f"the draft program of {drafter} reads {node.meta['name']}, which steps of the "
                "target do not write",
                where=_WHERE,
                hint="choose passes that read the target's own cache, or a summary of it",
            )


def with_draft(
    decision: Decision, graph: Graph, draft: DraftGraph, workload: Workload, target: Target
) -> Decision:
    """The decision to speculate, with what the draft program is, takes and stores.

    Args:
        decision: of ``speculate``, priced as if drafts were free.
        graph: of the target.
    """
    speculate = parse_pass(decision.pass_name)
    assert isinstance(speculate, Speculate)
    seconds = draft.seconds(speculate.priced_tokens, workload, target)
    delta = speculate.gain(
        Site("program", (), {"graph": graph, "draft_seconds": seconds}), workload, target
    )  # fmt: skip
    memory = draft.memory_bytes(graph, workload)
    reason = (
        f"{speculate.promise}; the draft program is the target's after {' and '.join(draft.reasons)}; "
        f"it drafts {speculate.priced_tokens} tokens in {seconds * 1e3:.3g} ms and stores "
        f"{quantity('bytes', memory)}; {delta.note}"
    )
    predicted = {"seconds_per_token": delta.seconds_per_token, "memory_bytes": float(memory)}
    return replace(decision, reason=reason, predicted=predicted)
