"""``plan``: the report without weights and without the hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from graphwright.cost_model.target import Target, resolve_target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import InputError
from graphwright.ir.printer import to_python
from graphwright.optimizer.driver import capture_step, describe, max_positions
from graphwright.optimizer.planner import Request, plan_exact
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.report import Report
from graphwright.optimizer.validate import check_model


def plan(
    model_or_config: PreTrainedModel | PretrainedConfig | str | Path,
    target: str | Target = "auto",
    *,
    workload: Workload | None = None,
    budget: Budget | None = None,
) -> Report:
    """What ``optimize`` would choose and how fast it would be; captured on the ``meta`` device.

    Args:
        model_or_config: a model, a configuration, or a path to a ``config.json`` or its folder.
        target, workload, budget: as for ``optimize``. Whether the workload fits the target's memory is
            part of the answer (``predicted["memory"]["fits"]``); a budget that is exceeded is an error.

    Raises:
        GraphwrightError: no such target, an unsupported model, or a budget that no plan meets.
    """
    progress = Progress()
    machine = resolve_target(target)
    with progress.step("building the model without weights"):
        model = _meta_model(model_or_config)
        check_model(model)
    with progress.step("capturing the graph"):
        graph, notes = capture_step(model)
        before = to_python(graph)
    with progress.step("planning"):
        request = Request(
            machine,
            workload or Workload(),
            budget or Budget(),
            max_positions(model.config),
            must_fit=budget is not None and budget.memory_bytes is not None,
        )
        planned = plan_exact(graph, request)
    report = describe(model, planned, None, notes, before)
    report.measured["seconds"] = {key: round(took, 3) for key, took in progress.seconds.items()}
    return report


def _meta_model(source: Any) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    config = source if isinstance(source, PretrainedConfig) else _read_config(source)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise InputError(
                f"{type(config).__name__} is not a causal language model's configuration",
                where="plan",
                hint="pass the configuration of a decoder-only model",
            ) from error
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _read_config(source: Any) -> PretrainedConfig:
    if not isinstance(source, str | Path):
        raise InputError(
            f"cannot plan for a {type(source).__name__}",
            where="plan",
            hint="pass a model, a configuration, or a path to config.json",
        )
    path = Path(source)
    try:
        folder = path.parent if path.suffix == ".json" else path
        if path.suffix == ".json" and path.name != "config.json":
            return AutoConfig.for_model(**_json(path))
        return AutoConfig.from_pretrained(str(folder) if path.exists() else str(source))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no readable model configuration: {str(error).splitlines()[0]}",
            where=str(source),
            hint="pass a config.json, a folder that holds one, or a hub id",
        ) from error


def _json(path: Path) -> dict[str, Any]:
    import json

    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "model_type" not in data:
        raise ValueError("it names no model_type")
    return data
