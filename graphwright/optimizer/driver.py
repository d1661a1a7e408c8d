"""``optimize``: the life of a call, one named step a line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import UnsupportedModelError
from graphwright.ir.graph import Graph
from graphwright.ir.printer import to_python
from graphwright.optimizer import check, machine
from graphwright.optimizer.build import Built, build, build_kernels, max_positions, op_by_op
from graphwright.optimizer.calibration import machine_target
from graphwright.optimizer.compiled_kernels import CompiledKernels, compile_kernels
from graphwright.optimizer.describe import chosen_plan, describe
from graphwright.optimizer.draft_models import check_draft_models, ready_speculation
from graphwright.optimizer.draft_program import rounded_trees
from graphwright.optimizer.drafting import measured_drafts
from graphwright.optimizer.graph_cache import cached_capture
from graphwright.optimizer.loss import Losses
from graphwright.optimizer.optimized import OptimizedModel, weights_bytes
from graphwright.optimizer.planner import Request, plan_best, plan_given
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.quality import calibration_text
from graphwright.optimizer.quality.samples import StoreSamples
from graphwright.optimizer.quality.sentences import sentence_ends
from graphwright.optimizer.report import Decision, Report, Status
from graphwright.optimizer.settle import Settled, keep, settle, undo_compilation
from graphwright.optimizer.tuning import tune_program
from graphwright.optimizer.validate import check_model, check_target_device
from graphwright.passes.base import Pass, parse_pass
from graphwright.runtime.speculation.acceptance import halves


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
        calibration: prompts like those that will run, as token sequences (lists or ``[T]`` tensors) or as
            text where the model's folder has a tokenizer. Losses, drafts and times are measured on them.
        seed: for the choice of calibration text where none is given.

    Returns:
        A program with transformers' ``generate`` and ``forward``, ``.report``, ``.plan``, ``.memory()``,
        ``.stats()``, ``.score()`` and ``.save()``.

    Raises:
        GraphwrightError: a subclass that says what was wrong, where, and what to do.
    """
    progress = Progress()
    with progress.step("checking the model"):
        check_runnable(model)
        given = None if passes is None else [parse_pass(p) for p in passes]
        check_draft_models(given or ())
    with progress.step("measuring this machine, once"):
        machine_figures = machine_target(target)
    with progress.step("capturing the graph"):
        graph, notes = capture_step(model)
    with progress.step("reading the calibration text"):
        prompts = read_prompts(model, calibration)
    graph.samples = store_samples(model, prompts, seed)
    job = Job(model, graph, make_request(model, machine_figures, workload, budget, prompts), prompts, seed)
    with progress.step("building the C++ kernels, once"):
        build_kernels(model.device)
    with progress.step("planning and lowering"):
        built, decisions = job.plan_and_build() if given is None else job.build_given(given)
    with progress.step("tuning kernels, once"):
        tune_program(built.program, job.request.workload)
    with progress.step("checking against the stock model"):
        measured = job.check(built)
    with progress.step("measuring the plan"):
        settled = job.settle(built, measured) if given is None else job.measure(built, measured)
    speculation = ready_speculation(settled.built.graph, settled.built.program, model)
    compiled = compile_kernels(model, settled.built.graph, job.request, progress)
    report = write_report(job, settled, measured, notes, decisions, compiled)
    report.measured["seconds"] = {key: round(took, 3) for key, took in progress.seconds.items()}
    return OptimizedModel(
        settled.built.program,
        config=model.config,
        generation_config=model.generation_config,
        speculation=speculation,
        plan=settled.built.planned.plan,
        report=report,
        graph=settled.built.graph,
        stock=model,
        compiled=compiled,
    )


# --- steps ---------------------------------------------------------------------------------------


def check_runnable(model: PreTrainedModel) -> None:
    """Refuse what cannot be compiled, and what has no weights to run."""
    check_model(model)
    if model.device.type == "meta":
        raise UnsupportedModelError(
            "the model is on the meta device and has no weights to run",
            hint="use graphwright.plan(model, target) for the report alone",
        )


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


def read_prompts(model: PreTrainedModel, calibration: Sequence[Any] | None) -> list[list[int]]:
    """The caller's prompts as token ids; none without calibration."""
    if calibration is None:
        return []
    return calibration_text(model, calibration, rows=_MOST_PROMPTS, tokens=_PROMPT_TOKENS).rows


_MOST_PROMPTS, _PROMPT_TOKENS = 32, 8192


def store_samples(model: PreTrainedModel, prompts: list[list[int]], seed: int) -> StoreSamples:
    """Data for calibrated codecs: other passages than losses are measured on, where we choose them."""

    def rows() -> list[list[int]]:
        return calibration_text(model, prompts or None, seed=seed + 1, rows=8, tokens=512).rows

    return StoreSamples(lambda graph: op_by_op(model, graph), rows, lambda: sentence_ends(model))


def make_request(
    model: PreTrainedModel,
    target: Target,
    workload: Workload | None,
    budget: Budget | None,
    prompts: Sequence[Sequence[int]],
) -> Request:
    """What the planner plans for; drafts are priced as the caller's texts would accept them."""
    drafts = measured_drafts(halves(prompts))
    return Request(
        target, workload or Workload(), budget or Budget(), max_positions(model.config), program_passes=drafts
    )


@dataclass
class Job:
    """One call of ``optimize``: what its steps share.

    Attributes:
        model: the stock model.
        graph: its canonical graph; planning works on copies.
        request: what is planned for.
        prompts: the caller's, as token ids.
        seed: the caller's.
    """

    model: PreTrainedModel
    graph: Graph
    request: Request
    prompts: list[list[int]]
    seed: int

    def build_given(self, passes: Sequence[Pass]) -> tuple[Built, list[Decision]]:
        """The caller's passes, lowered; what lossy ones lose is measured."""
        built = build(self.model, plan_given(self.graph.copy(), passes, self.request))
        if not built.is_lossy:
            return built, []
        losses = Losses(self.model, self.graph, self.prompts, self.seed, self.request.workload)
        losses.measure_whole(built, self.request)
        return built, losses.notes()

    def plan_and_build(self) -> tuple[Built, list[Decision]]:
        """The fastest plan within the budget, lowered; a lossy one is measured as a whole before it stays."""
        if not self.request.budget.allows_loss:
            return build(self.model, plan_best(self.graph, self.request)), []
        losses = Losses(self.model, self.graph, self.prompts, self.seed, self.request.workload)
        return losses.plan_and_build(self.request)

    def check(self, built: Built) -> dict[str, Any]:
        """Quality beside the stock model, and its time.

        Raises:
            VerificationError: exact passes gave other logits than the stock model.
        """
        program = built.program
        ids = check.calibration_rows(self.prompts, program, self.seed)
        with machine.safe_library(program.dtype, program.device) as full_speed:
            quality = check.compare_logits(self.model, program, ids)
            if not built.is_lossy:
                check.require_equal(quality, program.dtype, type(self.model).__name__)
            stock = check.measure_stock(self.model, program, self.request.workload) if full_speed else None
        return {"quality": {**quality, **built.quality}, **({"stock": stock} if stock is not None else {})}

    def settle(self, built: Built, measured: Mapping[str, Any]) -> Settled:
        """Measure the plan and its rivals; the fastest stays. A plan for another machine is only timed."""
        if check_target_device(self.model, self.request.target) is not None:
            return keep(built, self.request)
        stock = measured.get("stock", {}).get("seconds_per_token")
        return settle(self.model, self.graph, built, self.request, self.prompts, stock)

    def measure(self, built: Built, measured: Mapping[str, Any]) -> Settled:
        """Measure the caller's passes; nothing is undone but compiling, where it makes the program slow."""
        settled = keep(built, self.request)
        stock = measured.get("stock", {}).get("seconds_per_token")
        undo_compilation(self.model, settled, self.request, stock)
        return settled


def write_report(
    job: Job,
    settled: Settled,
    measured: Mapping[str, Any],
    notes: list[str],
    decisions: list[Decision],
    compiled: CompiledKernels | None = None,
) -> Report:
    """Everything that was decided, predicted and measured."""
    built = settled.built
    more = [*decisions, *settled.decisions, *built.fallbacks, *_notes(job, settled, measured)]
    report = describe(
        job.model, built.planned, job.request, built.program.lowered, notes, to_python(job.graph), more
    )
    report.plans = settled.rows or [chosen_plan(built.planned).as_row("chosen", settled.measured["decode"])]
    report.measured.update(measured)
    report.measured.update(settled.measured)
    report.measured["memory"] = {
        "cache_bytes": report.measured["decode"].pop("cache_bytes"),
        "weights_bytes": weights_bytes(built.graph),
        "prepared_bytes": built.program.prepared_bytes,
    }
    if compiled is not None:
        report.compiled = compiled.to_report()
        report.decisions += compiled.decisions()
    if "stock" in measured:
        stock = measured["stock"]["seconds_per_token"]
        report.measured["speedup"] = {"ratio": stock / settled.seconds_per_token}
    return report


def _notes(job: Job, settled: Settled, measured: Mapping[str, Any]) -> list[Decision]:
    """What a caller must know of where the program runs and how fast it is, if it is not as planned."""
    found = []
    elsewhere = check_target_device(job.model, job.request.target)
    if elsewhere is not None:
        warnings.warn(f"graphwright: {elsewhere}", stacklevel=4)
        found.append(Decision("lower", "", Status.FALLBACK, elsewhere, None, None, "exact"))
    graphs_off = settled.built.program.graphs_off
    if graphs_off is not None:
        reason = f"steps are not recorded as graphs: {graphs_off}"
        found.append(Decision("graphs", "", Status.FALLBACK, reason, None, None, "exact"))
    trees = rounded_trees(settled.built.graph, settled.built.program.lowered.kernels)
    if trees is not None:
        found.append(trees)
    if "stock" not in measured:
        reason = "the library's bfloat16 products crash on this machine, so stock was not timed"
        return [*found, Decision("check", "", Status.FALLBACK, reason, None, None, "exact")]
    ratio = settled.seconds_per_token / measured["stock"]["seconds_per_token"]
    if ratio > 1:
        reason = f"a token is measured at {ratio:.2f} times the stock model's time"
        found.append(Decision("program", "", Status.FALLBACK, reason, None, None, "exact"))
    return found
