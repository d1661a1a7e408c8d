"""``optimize``: the life of a call, one named step a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import InputError, UnsupportedModelError
from graphwright.ir.graph import Graph, value
from graphwright.ir.printer import to_python
from graphwright.optimizer import check, machine
from graphwright.optimizer.graph_cache import cached_capture
from graphwright.optimizer.optimized import OptimizedModel, weights_bytes
from graphwright.optimizer.planner import Planned, Request, plan_exact, plan_given
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.report import Decision, Report, Status
from graphwright.optimizer.validate import check_calibration, check_model, check_target_device
from graphwright.passes.base import Pass
from graphwright.runtime.lowering import LoweredStep, LoweringOptions, lower
from graphwright.runtime.program import Program
from graphwright.runtime.speculation import Speculation, make_speculation


def optimize(
    model: PreTrainedModel,
    target: str | Target = "auto",
    *,
    workload: Workload | None = None,
    budget: Budget | None = None,
    passes: Sequence[str | Pass] | None = None,
    calibration: Sequence[Any] | None = None,
    seed: int = 0,
) -> OptimizedModel:
    """Turn a transformers causal language model into a faster program with a stated loss of quality.

    Args:
        model: any decoder-only transformers model that dynamo captures; it is never changed.
        target: a name of :func:`graphwright.targets`, or ``auto`` for the machine at hand.
        workload: what will run (default: batch 1, prompt 1,024, generate 256).
        budget: what may be lost and used. Without one, only passes that keep the output run.
        passes: pass strings or objects that replace the planner's choice; ``[]`` means none.
        calibration: token sequences (lists or ``[T]`` tensors) to check and measure on.
        seed: for the synthetic calibration tokens.

    Returns:
        A program with transformers' ``generate`` and ``forward``, ``.report``, ``.plan``, ``.memory()``,
        ``.stats()``, ``.score()`` and ``.save()``.

    Raises:
        GraphwrightError: a subclass that says what was wrong, where, and what to do.
    """
    progress = Progress()
    workload, budget = workload or Workload(), budget or Budget()
    with progress.step("checking the model"):
        check_model(model)
        if model.device.type == "meta":
            raise UnsupportedModelError(
                "the model is on the meta device and has no weights to run",
                hint="use graphwright.plan(model, target) for the report alone",
            )
    with progress.step("reading the target"):
        machine_target = resolve_target(target)
    with progress.step("capturing the graph"):
        graph, notes = capture_step(model)
        before = to_python(graph)
    with progress.step("planning"):
        request = Request(machine_target, workload, budget, max_positions(model.config))
        calibrated = check_calibration(calibration, vocabulary(graph))
        if passes is None:
            planned = plan_exact(graph, request, calibrated)
        else:
            planned = plan_given(graph, passes, request)
    with progress.step("building the C++ kernels, once"):
        build_kernels(model.device)
    with progress.step("lowering"):
        step, fallbacks = lower_planned(planned.graph, model.device)
    elsewhere = check_target_device(model, machine_target)
    if elsewhere is not None:
        fallbacks.append(Decision("lower", "", Status.FALLBACK, elsewhere, None, None, "exact"))
    report = describe(model, planned, step, notes, before, fallbacks)
    program = make_program(model, planned.graph, step)
    with progress.step("checking against the stock model"):
        check_program(model, program, report, calibrated, workload, seed)
        program = undo_if_slower(model, planned.graph, program, report, workload)
        report.measured["memory"].update(
            weights_bytes=weights_bytes(planned.graph), prepared_bytes=step.prepared_bytes
        )
    report.measured["seconds"] = {key: round(took, 3) for key, took in progress.seconds.items()}
    return OptimizedModel(
        program,
        config=model.config,
        generation_config=model.generation_config,
        speculation=speculation_of(planned.graph),
        plan=planned.plan,
        report=report,
        graph=planned.graph,
        stock=model,
    )


# --- steps ---------------------------------------------------------------------------------------


def capture_step(model: PreTrainedModel) -> tuple[Graph, list[str]]:
    """The canonical graph, from the cache on disk if it is there, and its near misses."""
    graph, report, _ = cached_capture(model)
    if not graph.calls("attention"):
        raise UnsupportedModelError(
            "no attention was found in the graph",
            where=type(model).__name__,
            hint="graphwright compiles attention-based decoders; recurrent and state-space models are not",
        )
    return graph, [str(miss) for miss in report.near_misses]


def build_kernels(device: torch.device) -> None:
    """Build the C++ kernels where they can run; selection reports why where they cannot."""
    if device.type == "cpu":
        from graphwright.kernels.cpp.build import available

        available()


def lower_planned(graph: Graph, device: torch.device) -> tuple[LoweredStep, list[Decision]]:
    """Lower with Inductor if the plan says so; without a working compiler, op by op, and say so."""
    wanted = bool(graph.annotations.get("compile"))
    try:
        return lower(graph, device, LoweringOptions(compile=wanted)), []
    except Exception as error:
        if not wanted:
            raise
        reason = f"Inductor failed, the program runs op by op: {str(error).strip().splitlines()[0][:200]}"
        step = lower(graph, device, LoweringOptions(compile=False))
        return step, [Decision("compile_layers", "", Status.FALLBACK, reason, None, None, "reordered")]


def make_program(model: PreTrainedModel, graph: Graph, step: LoweredStep) -> Program:
    """The runnable program of a lowered graph."""
    logits = graph.output.args[0]
    first = logits[0] if isinstance(logits, tuple | list) else logits
    assert isinstance(first, torch.fx.Node)
    return Program(
        step,
        config=model.config,
        device=model.device,
        dtype=value(first).dtype,
        vocab_size=vocabulary(graph),
        max_positions=max_positions(model.config),
    )


def check_program(
    model: PreTrainedModel,
    program: Program,
    report: Report,
    calibration: Sequence[Any] | None,
    workload: Workload,
    seed: int,
) -> None:
    """Measure quality, time and memory beside the stock model, into the report.

    Raises:
        VerificationError: exact passes gave other logits than the stock model.
    """
    ids = check.calibration_rows(calibration, program, seed)
    with machine.safe_library(program.dtype, program.device) as full_speed:
        quality = check.compare_logits(model, program, ids)
        check.require_equal(quality, program.dtype, report.model)
        stock = check.measure_stock(model, program, workload) if full_speed else None
    decode = check.measure_decode(program, workload)
    report.measured["quality"] = quality
    report.measured["decode"] = {k: v for k, v in decode.items() if k != "cache_bytes"}
    report.measured["memory"] = {"cache_bytes": decode["cache_bytes"]}
    if stock is None:
        reason = "the library's bfloat16 products crash on this machine, so stock was not timed"
        report.decisions.append(Decision("check", "", Status.FALLBACK, reason, None, None, "exact"))
        return
    report.measured["stock"] = stock
    report.measured["speedup"] = {"ratio": stock["seconds_per_token"] / decode["seconds_per_token"]}


def undo_if_slower(
    model: PreTrainedModel, graph: Graph, program: Program, report: Report, workload: Workload
) -> Program:
    """Never silently slower: without compilation if that is faster, and a line in the report in any case."""
    stock = report.measured.get("stock")
    if stock is None or report.measured["decode"]["seconds_per_token"] <= stock["seconds_per_token"]:
        return program
    if program.lowered.compiled:
        plain = make_program(model, graph, lower(graph, model.device, LoweringOptions(compile=False)))
        before, after = report.measured["decode"], check.measure_decode(plain, workload)
        if after["seconds_per_token"] < before["seconds_per_token"]:
            saved = {"seconds_per_token": before["seconds_per_token"] - after["seconds_per_token"]}
            reason = "measured slower than the same program op by op"
            report.decisions.append(
                Decision("compile_layers", "", Status.UNDONE, reason, None, saved, "reordered")
            )
            report.measured["decode"] = {k: v for k, v in after.items() if k != "cache_bytes"}
            program = plain
    ratio = stock["seconds_per_token"] / report.measured["decode"]["seconds_per_token"]
    report.measured["speedup"] = {"ratio": ratio}
    if ratio < 1:
        reason = f"a decode step is measured at {1 / ratio:.2f} times the stock model's time"
        report.decisions.append(Decision("program", "", Status.FALLBACK, reason, None, None, "exact"))
    return program


def describe(
    model: PreTrainedModel,
    planned: Planned,
    step: LoweredStep | None,
    notes: list[str],
    before: str,
    more: Sequence[Decision] = (),
) -> Report:
    """The report, as far as it is known before anything runs."""
    graph = planned.graph
    report = Report(
        model=model_line(model),
        target=planned.plan.target,
        workload=asdict(planned.plan.workload),
        decisions=[*planned.decisions, *more],
        predicted={**planned.predicted, "before": planned.baseline["decode"]},
        ops=graph.counts(),
        near_misses=notes,
        code_before=before,
        code_after=to_python(graph),
        versions=machine.versions(),
    )
    if step is not None:
        report.kernels = [
            {"op": k.op, "provider": k.provider, "reason": k.reason}
            for k in step.kernels
            for _ in range(k.sites)
        ]
        report.decisions += _kernel_fallbacks(step)
    return report


def _kernel_fallbacks(step: LoweredStep) -> list[Decision]:
    return [
        Decision(
            f"kernel {k.op}", "", Status.FALLBACK, f"runs its reference body: {k.reason}", None, None, "exact"
        )
        for k in step.kernels
        if k.provider == "reference"
    ]


# --- facts ---------------------------------------------------------------------------------------


def speculation_of(graph: Graph) -> Speculation | None:
    """The drafter that the plan put into the graph's annotations."""
    chosen = graph.annotations.get("speculation")
    return None if chosen is None else make_speculation(chosen)


def vocabulary(graph: Graph) -> int:
    """V of the logits ``[B, T, V]``."""
    logits = graph.output.args[0]
    first = logits[0] if isinstance(logits, tuple | list) else logits
    if not isinstance(first, torch.fx.Node):
        raise InputError("the graph returns no logits")
    return int(value(first).shape[-1])


def max_positions(config: Any) -> int | None:
    """Most tokens of a sequence that the model was made for."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(text, name, None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def model_line(model: PreTrainedModel) -> str:
    """``LlamaForCausalLM, 134.5 M parameters, bfloat16``."""
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {count / 1e6:,.1f} M parameters, {str(model.dtype).split('.')[1]}"
