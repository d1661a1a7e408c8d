"""From a request to a rewritten graph: the choice is made, applied, and priced again as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from graphwright.ir.errors import BudgetError, PassError
from graphwright.ir.graph import Graph, module_path
from graphwright.optimizer.draft_program import DraftGraph, draft_graph, with_draft
from graphwright.optimizer.planner.menu import make_menu
from graphwright.optimizer.planner.request import Plan, Planned, Request, to_decision
from graphwright.optimizer.planner.store_kernels import kernel_family
from graphwright.optimizer.report import Decision, Status
from graphwright.passes.base import Pass, order_passes, parse_pass
from graphwright.passes.chunk_prefill import ChunkPrefill
from graphwright.passes.speculate import Speculate


def plan_given(graph: Graph, passes: Sequence[str | Pass], request: Request) -> Planned:
    """Apply the caller's passes, all of them.

    Raises:
        PassError: one of them cannot apply.
    """
    _annotate(graph, request)
    baseline = request.estimate(graph)
    applied, decisions = _apply_all(graph, [parse_pass(p) for p in passes], request)
    return _planned(graph, applied, decisions, baseline, request)


def _annotate(graph: Graph, request: Request) -> None:
    """What pricing must know of how the graph will run."""
    graph.annotations["compile"] = False
    graph.annotations["decode_kernels"] = kernel_family(request.target)


# Choices that a whole plan's workspace may push over the memory limit before giving up.
_ATTEMPTS = 4
# Tokens of a prompt's steps that are tried where those of longer ones do not fit.
_SMALLER_STEPS = (64, 128, 256)


def plan_best(graph: Graph, request: Request) -> Planned:
    """Choose the fastest plan within the budget; prompts run in smaller steps if that is what it takes.

    Args:
        graph: the canonical graph; stays as it is.
        request: what is planned for.

    Raises:
        BudgetError: nothing is within the budget; names the closest plan.
    """
    try:
        return _fastest(graph, request)
    except BudgetError:
        found = _in_smaller_steps(graph, request)
        if found is None:
            raise
        return found


def _in_smaller_steps(graph: Graph, request: Request) -> Planned | None:
    """The plan with the longest steps of prompts whose activations fit; None if there is none."""
    found = None
    for tokens in _SMALLER_STEPS:
        steps = ChunkPrefill(tokens=str(tokens))
        try:
            found = _fastest(graph, request, steps)
        except BudgetError:
            break
        reason = "what steps of 512 tokens hold at one time does not fit the memory"
        found.decisions.append(Decision(str(steps), "", Status.APPLIED, reason, fidelity=steps.fidelity))
        found.plan = replace(found.plan, passes=(*found.plan.passes, str(steps)))
        found.others = [replace(other, passes=(*other.passes, str(steps))) for other in found.others]
    return found


def _fastest(graph: Graph, request: Request, steps: ChunkPrefill | None = None) -> Planned:
    """:func:`plan_best` for prompts in such steps."""
    graph = graph.copy()
    _annotate(graph, request)
    baseline = request.estimate(graph)
    if steps is not None:
        graph.annotations["prefill_chunk"] = steps.size
    menu = make_menu(graph, request)
    for _ in range(_ATTEMPTS):
        best = menu.choose()
        trial = graph.copy()
        applied, decisions = _apply_all(trial, menu.passes_of(best), request)
        planned = _planned(trial, applied, decisions, baseline, request)
        if not menu.reserve(planned.plan.memory_bytes - best.memory_bytes):
            break
    else:
        menu.refuse(best)
    planned.plan = replace(
        planned.plan,
        seconds_per_token=best.seconds_per_token,  # as the others are priced: with drafts
        kl=best.kl,
        perplexity_ratio=best.perplexity,
    )
    planned.others = menu.others(best)
    planned.decisions += menu.refusals(best)
    return planned


# --- applying ------------------------------------------------------------------------------------


def _apply_all(graph: Graph, passes: Iterable[Pass], request: Request) -> tuple[list[str], list[Decision]]:
    """Apply passes in their order.

    Raises:
        PassError: one of them applies nowhere, or some layers are left without the cache that others have.
    """
    applied: list[str] = []
    decisions: list[Decision] = []
    for chosen in order_passes(passes):
        chosen = chosen.resolve(graph, request.workload, request.target, request.memory_limit)
        records = chosen(graph, request.workload, request.target, force=True)
        if not any(r.status == "applied" for r in records):
            reasons = "; ".join(sorted({f"{r.site}: {r.reason}" for r in records})[:3])
            raise PassError(
                f"{chosen} cannot apply: {reasons}", where="passes", hint="leave it out, or use passes=None"
            )
        applied.append(str(chosen))
        decisions += map(to_decision, records)
    if graph.placeholders("state") and (left := graph.calls("attention")):
        raise PassError(
            f"{len(left)} attentions have no cache, the first is {module_path(left[0]) or left[0].name}: "
            "a step would not see their past",
            where="passes",
            hint="place a cache in every layer, or in none",
        )
    return applied, decisions


def _planned(
    graph: Graph, applied: list[str], decisions: list[Decision], baseline: dict[str, Any], request: Request
) -> Planned:
    predicted = request.estimate(graph)
    draft = draft_graph(graph, request.workload, request.target)
    if draft is not None:
        decisions = [
            with_draft(d, graph, draft, request.workload, request.target) if _is_speculation(d) else d
            for d in decisions
        ]
    plan = Plan(
        tuple(applied),
        request.target.name,
        request.workload,
        request.budget,
        float(predicted["decode"]["seconds_per_token"]),
        float(predicted["memory"]["total_bytes"]) + _draft_bytes(draft, graph, request),
    )
    return Planned(graph, plan, decisions, predicted, baseline, draft=draft)


def _is_speculation(decision: Decision) -> bool:
    return decision.status is Status.APPLIED and isinstance(parse_pass(decision.pass_name), Speculate)


def _draft_bytes(draft: DraftGraph | None, graph: Graph, request: Request) -> float:
    """What a draft program stores beside the cache of the target's graph."""
    return 0.0 if draft is None else float(draft.memory_bytes(graph, request.workload))
