"""``save`` and ``load``: a program without searching again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import PlanError
from graphwright.optimizer.build import build_kernels, build_program
from graphwright.optimizer.draft_models import ready_speculation
from graphwright.optimizer.optimized import OptimizedModel
from graphwright.optimizer.planner import Plan
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.report import Report
from graphwright.optimizer.saved_kernels import install_kernels, kernel_files
from graphwright.optimizer.saved_plan import SavedPlan, load_plan, save_plan
from graphwright.optimizer.validate import check_model


def save(fast: OptimizedModel, directory: Path) -> None:
    """Write the plan, the rewritten graph, the report and the compiled kernels of a program."""
    plan = fast.plan
    save_plan(
        directory,
        fast.stock,
        plan={
            "passes": list(plan.passes),
            "target": plan.target,
            "workload": asdict(plan.workload),
            "budget": asdict(plan.budget),
            "seconds_per_token": plan.seconds_per_token,
            "memory_bytes": plan.memory_bytes,
            "kl": plan.kl,
            "perplexity_ratio": plan.perplexity_ratio,
        },
        report_json=fast.report.to_json(),
        graph=fast.graph,
        kernels=kernel_files(fast.compiled),
    )


def load(directory: str | Path, model: PreTrainedModel) -> OptimizedModel:
    """A program that :meth:`OptimizedModel.save` wrote, over the weights of ``model``.

    Neither captures nor searches; Inductor's cache on disk holds what was compiled. Kernels that were saved
    go into Triton's cache, where the target finds them.

    Args:
        directory: what was saved.
        model: a model of the same class, configuration, shapes and dtypes, and of the same weights if the
            plan loses quality or holds tables computed from them; never changed.

    Raises:
        PlanError: the plan was cut off or edited, or made for another model, shape or machine, or for
            other weights where these matter; the difference is spelt out.
        GraphwrightError: the model cannot be run, as for ``optimize``.
    """
    progress = Progress()
    with progress.step("checking the model"):
        check_model(model)
    with progress.step("reading the plan"):
        saved, graph = load_plan(directory, model)
        if graph is None:
            raise PlanError(
                "the saved plan holds no graph", where=str(directory), hint="save it again with save()"
            )
    with progress.step("building the C++ kernels, once"):
        build_kernels(model.device)
    fallbacks = install_kernels(saved.kernels, str(directory))
    with progress.step("lowering"):
        program, more = build_program(model, graph)
    report = Report.from_json(saved.report_json, where=str(directory))
    report.decisions += [*fallbacks, *more]
    report.measured["seconds"] = {key: round(took, 3) for key, took in progress.seconds.items()}
    return OptimizedModel(
        program,
        config=model.config,
        generation_config=model.generation_config,
        speculation=ready_speculation(graph, program, model),
        plan=_plan(saved),
        report=report,
        graph=graph,
        stock=model,
    )


def _plan(saved: SavedPlan) -> Plan:
    return Plan(
        tuple(saved.passes),
        saved.target,
        Workload(**saved.workload),
        Budget(**saved.budget),
        float(saved.more["seconds_per_token"]),
        float(saved.more["memory_bytes"]),
        float(saved.more.get("kl", 0.0)),
        float(saved.more.get("perplexity_ratio", 1.0)),
    )
