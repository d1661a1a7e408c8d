"""Writing the report of a plan: what was decided and predicted, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from graphwright.cost_model.crossover import crossovers
from graphwright.cost_model.curves import describe_cost, memory_curve, roofline_curve
from graphwright.cost_model.graph_cost import graph_cost
from graphwright.cost_model.parallel import tensor_parallel
from graphwright.cost_model.speculation import predict_speculation
from graphwright.ir.printer import to_python
from graphwright.optimizer import machine
from graphwright.optimizer.planner import Candidate, Planned, Request
from graphwright.optimizer.report import Decision, Report, Status
from graphwright.passes.base import parse_pass
from graphwright.passes.speculate import Speculate
from graphwright.runtime.lowering import LoweredStep

#: Numbers of devices that memory is shown for under tensor parallelism.
_DEVICES = (2, 4, 8)


def describe(
    model: PreTrainedModel,
    planned: Planned,
    request: Request,
    step: LoweredStep | None,
    notes: list[str],
    before: str,
    more: Sequence[Decision] = (),
) -> Report:
    """The report, as far as it is known before anything runs.

    Args:
        model: what was planned for.
        planned: the plan with its rewritten graph.
        request: what it was planned for.
        step: the lowered graph, for its kernels; None if nothing was lowered.
        notes: near misses of canonicalization.
        before: the captured graph as runnable Python.
        more: decisions that were made after planning.
    """
    graph, plan = planned.graph, planned.plan
    report = Report(
        model=model_line(model),
        target=plan.target,
        workload=asdict(plan.workload),
        decisions=[*planned.decisions, *more],
        predicted={**planned.predicted, "before": planned.baseline["decode"]},
        ops=graph.counts(),
        near_misses=notes,
        code_before=before,
        code_after=to_python(graph),
        versions=machine.versions(),
        plans=[chosen_plan(planned).as_row("chosen"), *(c.as_row("runner-up") for c in planned.others)],
    )
    if plan.kl > 0 or plan.perplexity_ratio != 1:
        report.predicted["quality"] = {"mean_kl": plan.kl, "perplexity_ratio": plan.perplexity_ratio}
    _describe_costs(report, planned, request)
    if step is not None:
        report.kernels = [
            {"op": k.op, "provider": k.provider, "reason": k.reason}
            for k in step.kernels
            for _ in range(k.sites)
        ]
        report.decisions += _kernel_fallbacks(step)
    return report


def chosen_plan(planned: Planned) -> Candidate:
    """The plan itself as a line among the plans."""
    plan = planned.plan
    return Candidate(
        plan.passes, plan.seconds_per_token, plan.memory_bytes, plan.kl, plan.perplexity_ratio,
        "the fastest within the budget", float(planned.predicted["decode"]["seconds_per_token"]),
    )  # fmt: skip


def _describe_costs(report: Report, planned: Planned, request: Request) -> None:
    """Expressions, curves and crossovers of the rewritten graph."""
    cost = graph_cost(planned.graph)
    target, workload = request.target, request.workload
    place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context}
    speculate = drafts_of(planned.plan.passes)
    report.costs["decode"] = describe_cost(cost, target, "decode", **place, tokens=1)
    drafts: dict[str, Any] = {}
    if speculate is not None:
        tokens = speculate.step_shape().tokens
        report.costs["verify"] = describe_cost(cost, target, "verify", **place, tokens=tokens)
        drafts = {
            "acceptance": speculate.acceptance,
            "drafts": speculate.priced_tokens,
            "hit_rate": speculate.hit_rate,
            "draft_seconds": _draft_seconds(planned, speculate, request),
        }
        report.predicted["speculation"] = predict_speculation(cost, target, **drafts, **place)
    report.costs["prefill"] = describe_cost(
        cost, target, "prefill", batch=workload.batch, context=0.0, tokens=workload.prompt
    )
    report.curves = {
        "roofline": roofline_curve(cost, target, **place),
        "memory": memory_curve(
            planned.graph, target, workload, limit_bytes=int(request.memory_limit),
            max_positions=request.max_positions,
        ),
    }  # fmt: skip
    if target.kind != "cpu":
        shards = tensor_parallel(
            planned.graph, target, workload, degrees=_DEVICES, max_positions=request.max_positions
        )
        report.predicted["memory_per_device"] = {
            f"on_{shard['devices']}_devices_bytes": shard["total_bytes"] for shard in shards
        }
    report.crossovers = crossovers(
        cost,
        target,
        workload,
        max_positions=request.max_positions,
        memory=planned.predicted["memory"],
        **drafts,
    )


def _draft_seconds(planned: Planned, speculate: Speculate, request: Request) -> float:
    """Predicted, of a cycle's drafts; 0 where no program makes them."""
    if planned.draft is None:
        return 0.0
    return planned.draft.seconds(speculate.priced_tokens, request.workload, request.target)


def without_speculation(passes: Sequence[str]) -> tuple[str, ...]:
    """The passes that change the graph."""
    return tuple(p for p in passes if not isinstance(parse_pass(p), Speculate))


def lossy_passes(passes: Sequence[str]) -> tuple[str, ...]:
    """Those that change what the model computes."""
    return tuple(p for p in passes if parse_pass(p).fidelity == "lossy")


def drafts_of(passes: Sequence[str]) -> Speculate | None:
    """The pass that drafts, if there is one."""
    return next((p for p in map(parse_pass, passes) if isinstance(p, Speculate)), None)


def _kernel_fallbacks(step: LoweredStep) -> list[Decision]:
    return [
        Decision(
            f"kernel {k.op}", "", Status.FALLBACK, f"runs its reference body: {k.reason}", None, None, "exact"
        )
        for k in step.kernels
        if k.provider == "reference"
    ]


def model_line(model: PreTrainedModel) -> str:
    """``LlamaForCausalLM, 134.5 M parameters, bfloat16``."""
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {count / 1e6:,.1f} M parameters, {str(model.dtype).split('.')[1]}"
