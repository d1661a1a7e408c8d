"""``plan``: the report without weights and without the hardware.

Capture and planning are apart, so that one captured graph can be planned for many machines
(:mod:`graphwright.optimizer.compare`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Budget, Workload
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph
from graphwright.ir.printer import to_python
from graphwright.optimizer.build import max_positions
from graphwright.optimizer.calibration import machine_target
from graphwright.optimizer.describe import describe
from graphwright.optimizer.driver import capture_step
from graphwright.optimizer.planner import Request, plan_best
from graphwright.optimizer.progress import Progress
from graphwright.optimizer.quantities import clean
from graphwright.optimizer.report import Report
from graphwright.optimizer.validate import check_model

_WANTED = "pass a decoder-only model, its configuration, or a path to its config.json"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


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
    machine = find_machine(target, progress)
    captured = capture_without_weights(model_or_config, progress)
    return plan_captured(captured, machine, workload, budget, progress)


def find_machine(target: str | Target, progress: Progress) -> Target:
    """The target of a name; the machine at hand is measured if it never was.

    Raises:
        UnknownTargetError: no such target.
    """
    with progress.step("reading the target"):
        return machine_target(target)


@dataclass(frozen=True)
class Captured:
    """A model's canonical graph, which any number of machines can be planned for.

    Attributes:
        model: on the ``meta`` device, unless the caller passed one with weights.
        graph: canonical; planning works on copies of it.
        notes: near misses of canonicalization.
        before: the graph as runnable Python.
        seconds: how long each step took, by its title.
    """

    model: PreTrainedModel
    graph: Graph
    notes: list[str]
    before: str
    seconds: dict[str, float]


def capture_without_weights(model_or_config: Any, progress: Progress) -> Captured:
    """Build the model on the ``meta`` device and capture it.

    Raises:
        InputError: not a causal language model's configuration.
        CaptureError, UnsupportedModelError: as for ``optimize``.
    """
    with progress.step("building the model without weights"):
        model = _meta_model(model_or_config)
        check_model(model)
    with progress.step("capturing the graph"):
        graph, notes = capture_step(model)
        before = to_python(graph)
    return Captured(model, graph, notes, before, dict(progress.seconds))


def plan_captured(
    captured: Captured,
    machine: Target,
    workload: Workload | None,
    budget: Budget | None,
    progress: Progress,
) -> Report:
    """Plan a captured graph for one machine; the graph stays as it is.

    Raises:
        BudgetError: no plan meets the budget.
    """
    _check_arguments(workload, budget)
    title = "planning"
    earlier = progress.seconds.get(title, 0.0)
    with progress.step(title):
        request = Request(
            machine,
            workload or Workload(),
            budget or Budget(),
            max_positions(captured.model.config),
            must_fit=budget is not None and budget.memory_bytes is not None,
        )
        planned = plan_best(captured.graph, request)
        report = describe(captured.model, planned, request, None, captured.notes, captured.before)
    took = {**captured.seconds, title: progress.seconds[title] - earlier}
    report.measured["seconds"] = {key: round(seconds, 3) for key, seconds in took.items()}
    return report


def _check_arguments(workload: Any, budget: Any) -> None:
    for name, given, kind in (("workload", workload, Workload), ("budget", budget, Budget)):
        if given is not None and not isinstance(given, kind):
            raise InputError(
                f"{name} is a {type(given).__name__}",
                where=f"plan({name}=...)",
                hint=f"pass a graphwright.{kind.__name__}",
            )


# --- from what the caller has to a model on the meta device ----------------------------------------


def _meta_model(source: Any) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    config = source if isinstance(source, PretrainedConfig) else read_config(source)
    where = type(config).__name__ if config is source else str(source)
    _check_config(config, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a constructor fails in any way on sizes that make no model
        raise InputError(
            f"transformers makes no model of this {type(config).__name__}: {first_line(error)}",
            where=where,
            hint="check the sizes and names in the configuration, e.g. that heads divide the hidden size",
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _check_config(config: PretrainedConfig, where: str) -> None:
    """Refuse what is not a decoder, or one of sizes below one, before a constructor stumbles over it."""
    kind = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{kind} describes an encoder-decoder", where=where, hint=_WANTED)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(f"{kind} is not a causal language model's configuration", where=where, hint=_WANTED)
    text = config.get_text_config()
    for name in _SIZES:
        size = getattr(text, name, None)
        if isinstance(size, int) and size < 1:
            raise InputError(f"{name} is {size}", where=where, hint="a model has at least one of each")


def read_config(source: Any, gguf_file: str | None = None) -> PretrainedConfig:
    """The configuration at a path or of a hub id; code that comes with it is never run.

    Args:
        source: a JSON file of any name, a folder that holds ``config.json``, or a hub id.
        gguf_file: a GGUF file in that folder, whose metadata is read instead.

    Raises:
        InputError: no such file, not a configuration, or of a model type that transformers does not know.
    """
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"cannot plan for a {type(source).__name__}", where="plan", hint=_WANTED)
    path = Path(source)
    named_as_file = path.suffix == ".json" or not isinstance(source, str) or path.is_absolute()
    if named_as_file and not path.exists():
        raise InputError("there is no such file or folder", where=str(path), hint=_WANTED)
    if path.exists():
        file = path / (gguf_file or "config.json") if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"the folder holds no {file.name}", where=str(path), hint=_WANTED)
        if gguf_file is None:
            _check_json(file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False, **options)
    except Exception as error:  # what a file holds can fail anywhere in transformers
        raise InputError(
            f"no readable model configuration: {first_line(error)}",
            where=str(source),
            hint="pass a config.json, a folder that holds one, or a hub id that is reachable or cached",
        ) from error


def _check_json(file: Path) -> None:
    """What transformers would tell less clearly: not JSON, no object, or no model type."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"not readable as JSON: {first_line(error)}", where=str(file), hint=_WANTED
        ) from None
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise InputError("the configuration names no model_type", where=str(file), hint=_WANTED)


def first_line(error: Exception) -> str:
    """What an error says first, with its kind where the text alone would not be understood.

    Control characters, which a file that is quoted may hold, are made visible.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, OSError | ValueError | ImportError) and said
    return clean(said if plain else f"{type(error).__name__}: {said}".removesuffix(": "))
