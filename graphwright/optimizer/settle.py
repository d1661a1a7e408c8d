"""Check and undo: what the measurements say about a plan, and what follows from it.

A prediction chose the plan. Here the program is timed; a rival that was predicted to be faster than the
program now proves to be is built and timed as well, and the fastest stays. Drafts are decided last, with
the acceptance on the caller's prompts and the measured time of a verification step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from graphwright.ir.graph import Graph
from graphwright.optimizer import check, machine
from graphwright.optimizer.build import Built, build, op_by_op
from graphwright.optimizer.describe import chosen_plan, drafts_of, lossy_passes, without_speculation
from graphwright.optimizer.planner import Candidate, Planned, Request, plan_given
from graphwright.optimizer.quantities import duration
from graphwright.optimizer.report import Decision, Status
from graphwright.optimizer.settle_drafts import same_drafts, settle_drafts
from graphwright.optimizer.settled import NOISE, Settled
from graphwright.passes.base import parse_pass
from graphwright.passes.compile_layers import CompileLayers

__all__ = ["Settled", "keep", "settle", "undo_compilation"]

#: Rivals that are built and timed at most.
_MOST_RIVALS = 2


def keep(built: Built, request: Request) -> Settled:
    """Time the program as it is."""
    step = check.measure_decode(built.program, request.workload)
    passes = without_speculation(built.planned.plan.passes)
    return Settled(built, {"decode": step}, times={passes: step["seconds_per_token"]})


def undo_compilation(
    model: PreTrainedModel, settled: Settled, request: Request, stock_seconds: float | None
) -> None:
    """Never silently slower: a compiled program that stock beats runs op by op where that is faster."""
    built, before = settled.built, settled.step_seconds
    if stock_seconds is None or before <= stock_seconds or not built.program.lowered.compiled:
        return
    program = op_by_op(model, built.graph)
    step = check.measure_decode(program, request.workload)
    saved = before - step["seconds_per_token"]
    if saved <= 0:
        return
    reason = "measured slower than the same program op by op"
    settled.decisions.append(
        Decision("compile_layers", "", Status.UNDONE, reason, None, {"seconds_per_token": saved}, "reordered")
    )
    settled.built = replace(built, planned=_uncompiled(built.planned, request), program=program)
    settled.measured["decode"] = step
    settled.times[without_speculation(settled.built.planned.plan.passes)] = step["seconds_per_token"]


def _uncompiled(planned: Planned, request: Request) -> Planned:
    """The plan without compiling: it is saved, priced and reported as it runs."""
    planned.graph.annotations["compile"] = False
    predicted = request.estimate(planned.graph)
    passes = tuple(p for p in planned.plan.passes if not isinstance(parse_pass(p), CompileLayers))
    seconds = float(predicted["decode"]["seconds_per_token"])
    decisions = [d for d in planned.decisions if d.pass_name != CompileLayers.name]
    plan = replace(planned.plan, passes=passes, seconds_per_token=seconds)
    return replace(planned, plan=plan, decisions=decisions, predicted=predicted)


def settle(
    model: PreTrainedModel,
    graph: Graph,
    built: Built,
    request: Request,
    prompts: Sequence[Sequence[int]],
    stock_seconds: float | None = None,
) -> Settled:
    """Time the program and its nearest rivals, keep the fastest, and settle whether and how to draft.

    Args:
        model: the stock model.
        graph: its canonical graph, from which rivals are built.
        built: the program that the planner chose.
        request: what it was planned for.
        prompts: the caller's, as token ids; without any, drafts are priced with what was assumed.
        stock_seconds: a token in the stock model, if it could be timed.

    Raises:
        VerificationError: the rival that stays gave other logits than the stock model.
    """
    first = chosen_plan(built.planned)
    settled = keep(built, request)
    undo_compilation(model, settled, request, stock_seconds)
    _try_rivals(model, graph, settled, request, prompts)
    settle_drafts(model, settled, request, prompts)
    settled.rows = _rows(first, settled)
    return settled


# --- rivals --------------------------------------------------------------------------------------


def _try_rivals(
    model: PreTrainedModel,
    graph: Graph,
    settled: Settled,
    request: Request,
    prompts: Sequence[Sequence[int]],
) -> None:
    """Build what should beat the measured time if its prediction is right, and keep what does."""
    first, before, tried = settled.built, settled.measured["decode"], 0
    for rival in _rivals(first.planned, settled.times):
        if tried == _MOST_RIVALS:
            break
        if rival.step_seconds >= (1 - NOISE) * settled.step_seconds:
            continue
        planned = plan_given(graph.copy(), rival.passes, request)
        if planned.plan.memory_bytes > request.memory_limit:
            continue
        other, tried = build(model, planned), tried + 1
        step = check.measure_decode(other.program, request.workload)
        settled.times[rival.passes] = step["seconds_per_token"]
        if step["seconds_per_token"] < (1 - NOISE) * settled.step_seconds:
            settled.built, settled.measured["decode"] = _instead(first, other, rival), step
    if settled.built is not first:
        settled.decisions += _exchanged(
            first.planned, settled.built.planned, before, settled.measured["decode"]
        )
        settled.measured["quality"] = _quality(model, settled.built, prompts)


def _rivals(planned: Planned, timed: Collection[tuple[str, ...]]) -> list[Candidate]:
    """Other plans without their drafts, by the predicted time of a plain step.

    Losses were measured for the chosen plan: a rival loses nothing, or by the same passes. What a
    prediction has wrong it has wrong in every layer, so plans that differ in all of them come first.
    """
    own = lossy_passes(planned.plan.passes)
    found: dict[tuple[str, ...], Candidate] = {}
    for other in sorted(planned.others, key=lambda c: (_is_mixed(c), c.step_seconds)):
        passes = without_speculation(other.passes)
        if passes not in timed and lossy_passes(passes) in ((), own):
            found.setdefault(passes, replace(other, passes=passes))
    return list(found.values())


def _is_mixed(plan: Candidate) -> bool:
    return any(parse_pass(p).layers for p in plan.passes)


def _instead(old: Built, new: Built, rival: Candidate) -> Built:
    """The rival in the place of the plan, with the drafts and the refusals that were the plan's."""
    own = new.planned
    drafts = drafts_of(old.planned.plan.passes)
    passes = own.plan.passes if drafts is None else (*own.plan.passes, str(drafts))
    plan = replace(own.plan, passes=passes, kl=rival.kl, perplexity_ratio=rival.perplexity_ratio)
    kept = [
        d
        for d in old.planned.decisions
        if d.pass_name not in own.plan.passes
        and (d.status is not Status.APPLIED or (drafts is not None and d.pass_name == str(drafts)))
    ]
    planned = replace(
        own,
        plan=plan,
        decisions=[*own.decisions, *kept],
        others=[replace(chosen_plan(old.planned), reason=_SLOWER), *old.planned.others],
        baseline=old.planned.baseline,
    )
    return replace(new, planned=planned, quality=old.quality if new.is_lossy else {})


def _exchanged(
    old: Planned, new: Planned, before: dict[str, float], after: dict[str, float]
) -> list[Decision]:
    """What gave way to what, with the measured times of a step."""
    gone = [p for p in old.plan.passes if p not in new.plan.passes]
    come = [p for p in new.plan.passes if p not in old.plan.passes]
    saved = before["seconds_per_token"] - after["seconds_per_token"]
    slow, fast = (f"{duration(step['seconds_per_token'])} a step" for step in (before, after))
    undone = f"measured {slow} with it, {fast} {'with ' + ' and '.join(come) if come else 'without'}"
    applied = f"measured {fast} with it, {slow} {'with ' + ' and '.join(gone) if gone else 'without'}"
    return [
        Decision(p, "", status, reason, None, {"seconds_per_token": change}, parse_pass(p).fidelity)
        for passes, status, reason, change in (
            (gone, Status.UNDONE, undone, saved),
            (come, Status.APPLIED, applied, -saved),
        )
        for p in passes
    ]


def _quality(model: PreTrainedModel, built: Built, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """The rival that stays beside the stock model, as the planner's program was compared before.

    Raises:
        VerificationError: exact passes gave other logits than the stock model.
    """
    program = built.program
    ids = check.calibration_rows(prompts, program, seed=0)
    with machine.safe_library(program.dtype, program.device):
        quality = check.compare_logits(model, program, ids)
    if not built.is_lossy:
        check.require_equal(quality, program.dtype, type(model).__name__)
    return {**quality, **built.quality}


# --- the report's plans --------------------------------------------------------------------------

_SLOWER = "predicted to be the fastest within the budget, and measured slower"


def _rows(first: Candidate, settled: Settled) -> list[dict[str, Any]]:
    """The plans with what was measured of them; ``first`` is the planner's own, marked where undone."""
    planned = settled.built.planned
    final = chosen_plan(planned)
    undone = not _alike(first, final)
    if undone:
        final = replace(final, reason="measured faster than what was predicted to be the fastest")
    rows = [final.as_row("chosen", {"seconds_per_token": settled.seconds_per_token})]
    if undone:
        rows.append(replace(first, reason=_SLOWER).as_row("undone", _time(first, settled)))
    others = [c for c in planned.others if not (_alike(c, final) or _alike(c, first))]
    return rows + [other.as_row("runner-up", _time(other, settled)) for other in others]


def _alike(one: Candidate, other: Candidate) -> bool:
    """The same program; the acceptance that drafts were priced with is no part of it."""
    return without_speculation(one.passes) == without_speculation(other.passes) and same_drafts(
        drafts_of(one.passes), drafts_of(other.passes)
    )


def _time(plan: Candidate, settled: Settled) -> dict[str, float] | None:
    found = settled.times.get(plan.passes)
    return None if found is None else {"seconds_per_token": found}
