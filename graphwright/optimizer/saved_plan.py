"""A program on disk: the plan as a readable file, the rewritten graph, the report. Never pickle.

``plan.json`` says what was decided, for which model and on which machine, with a checksum; beside it
are ``graph.json`` (so that loading neither captures nor searches), ``report.json`` and, if the graph
has tensors that the model does not own, ``constants.safetensors``, and in ``kernels/`` what was compiled for
the target (:mod:`graphwright.optimizer.saved_kernels`). The weights are never stored. An exact
plan fits every checkpoint of the same architecture and dtype. A lossy one fits the weights that its loss
was measured with, and one with tables that passes computed from weights fits those: both keep a digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from graphwright.cost_model.host import cpu_name
from graphwright.cost_model.target import match_device
from graphwright.ir.errors import PlanError, VerificationError
from graphwright.ir.graph import Graph
from graphwright.ir.serialize import dumps, graph_from_json, graph_to_json
from graphwright.ir.verifier import verify
from graphwright.optimizer import machine
from graphwright.optimizer.describe import lossy_passes
from graphwright.optimizer.fingerprint import clean_config
from graphwright.optimizer.graph_cache import made_by_capture, model_tensors, pack_tensors, unpack_tensors
from graphwright.optimizer.weights import weights_digest

SCHEMA = "graphwright.plan/1"
PLAN, GRAPH, REPORT, CONSTANTS = "plan.json", "graph.json", "report.json", "constants.safetensors"
_FILES = frozenset({PLAN, GRAPH, REPORT, CONSTANTS})
_KERNELS = re.compile(r"kernels/[A-Za-z0-9_]+\.[a-z]+")
_AGAIN = "optimize the model again, and save the result to another folder"
# What a plan must say; saving adds the rest.
_DECIDED = {"passes": list, "target": str, "workload": dict, "budget": dict}
_ADDED = {"model": dict, "machine": dict, "versions": dict, "files": dict, "constants": dict}
# Fields of a configuration that generation reads and the graph does not.
_GENERATION = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "use_cache", "architectures"}
)
_VERSIONS = ("graphwright", "torch", "transformers")


@dataclass(frozen=True)
class SavedPlan:
    """A plan as it was read, whole and unedited; not yet compared with a model.

    Attributes:
        directory: where it was read from.
        passes: the applied passes in order, as strings.
        target, workload, budget: what it was made for.
        model: class, configuration and tensors of the model that it was made for.
        machine: device, processor, architecture and threads that it was made on.
        versions: of graphwright, torch and transformers, among others.
        weights: a digest of the only weights that the plan fits; None if it fits any.
        more: everything else that was saved with the plan, such as predictions.
        report_json: the report as :meth:`Report.to_json` wrote it.
        graph_data: the rewritten graph, see :mod:`graphwright.ir.serialize`; None if none was saved.
        constants: what ``constants.safetensors`` does not say about its tensors.
        kernels: files of compiled kernels by path.
    """

    directory: Path
    passes: tuple[str, ...]
    target: str
    workload: dict[str, Any]
    budget: dict[str, Any]
    model: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    weights: str | None
    more: dict[str, Any]
    report_json: str = field(repr=False)
    graph_data: dict[str, Any] | None = field(repr=False)
    constants: dict[str, Any] = field(repr=False)
    kernels: dict[str, bytes] = field(repr=False)

    def graph(self, model: PreTrainedModel) -> Graph | None:
        """The rewritten graph over the tensors of ``model``, verified; None if none was saved.

        Raises:
            PlanError: the graph does not fit the model.
        """
        if self.graph_data is None:
            return None
        tensors = model_tensors(model)
        if self.constants:
            try:
                tensors |= unpack_tensors(self.directory / CONSTANTS, self.constants, model.device)
            except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
                raise _damaged(self.directory / CONSTANTS, str(error)) from error
        graph = graph_from_json(self.graph_data, tensors, model.device)
        try:
            verify(graph)
        except VerificationError as error:
            raise _damaged(self.directory / GRAPH, error.what) from error
        return graph


def save_plan(
    directory: str | Path,
    model: PreTrainedModel,
    *,
    plan: Mapping[str, Any],
    report_json: str,
    graph: Graph | None,
    kernels: Mapping[str, bytes] | None = None,
) -> None:
    """Write a plan: all of it, or nothing.

    Args:
        directory: made if it is missing; an earlier plan there is replaced.
        model: what the plan is for.
        plan: ``passes``, ``target``, ``workload`` and ``budget``, and any further plain data.
        report_json: the report.
        graph: the rewritten graph.
        kernels: files of compiled kernels by path.

    Raises:
        PlanError: the directory holds something else, or the plan is not plain data.
    """
    directory = Path(directory)
    for key, kind in _DECIDED.items():
        if not isinstance(plan.get(key), kind):
            raise PlanError(f"the plan has no {key}", where="save", hint=f"{key} is a {kind.__name__}")
    _check_place(directory)
    files = {REPORT: report_json.encode(), **(kernels or {})}
    constants: dict[str, Any] = {}
    owned = model_tensors(model)
    bound = bool(lossy_passes(plan["passes"]))
    if graph is not None:
        made = {name: t for name, t in graph.parameters.items() if name not in owned}
        bound |= not made.keys() <= made_by_capture(graph).keys()
        constants, packed = pack_tensors(made)
        files[GRAPH] = dumps(graph_to_json(graph)).encode()
        if constants:
            files[CONSTANTS] = packed
    document = {
        **plan,
        "schema": SCHEMA,
        "model": describe_model(model),
        "machine": describe_machine(model.device),
        "versions": machine.versions(),
        "weights": weights_digest(owned) if bound else None,
        "constants": constants,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    try:
        document["checksum"] = _checksum(document)
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise PlanError(f"the plan is not plain data: {error}", where="save") from error
    files[PLAN] = text.encode()
    try:
        _write_folder(directory, files)
    except OSError as error:
        raise PlanError(
            f"the plan cannot be written: {error.strerror or error}",
            where=str(directory),
            hint="choose a folder that you may write to, on a disk with room",
        ) from error


def read_plan(directory: str | Path) -> SavedPlan:
    """Read a plan and check that it is whole and unedited.

    Raises:
        PlanError: there is none, or it was cut off or edited, or another version wrote it.
    """
    directory = Path(directory)
    document = _read_document(directory)
    contents = {name: _read_file(directory, name, digest) for name, digest in document["files"].items()}
    if REPORT not in contents:
        raise _damaged(directory / PLAN, "it names no report")
    graph_data = _parse(contents[GRAPH], directory / GRAPH) if GRAPH in contents else None
    known = {*_DECIDED, *_ADDED, "weights", "schema", "checksum"}
    return SavedPlan(
        directory=directory,
        passes=tuple(document["passes"]),
        target=document["target"],
        workload=document["workload"],
        budget=document["budget"],
        model=document["model"],
        machine=document["machine"],
        versions=document["versions"],
        weights=document.get("weights"),
        more={key: content for key, content in document.items() if key not in known},
        report_json=contents[REPORT].decode("utf-8"),
        graph_data=graph_data,
        constants=document["constants"],
        kernels={name: content for name, content in contents.items() if _KERNELS.fullmatch(name)},
    )


def check_plan(plan: SavedPlan, model: PreTrainedModel, target: str | None = None) -> None:
    """Refuse a plan that was made for something else.

    Args:
        target: the target that is wanted, if it is not whatever the plan was made for.

    Raises:
        PlanError: lists every field that differs, with the saved value and this one; or the weights differ
            and matter to this plan.
    """
    now = machine.versions()
    own = {
        "target": plan.target if target is None else target,
        "model": describe_model(model),
        "machine": plan.machine if _is_target(plan, model.device) else describe_machine(model.device),
        "versions": {name: now[name] for name in _VERSIONS},
    }
    versions = {name: plan.versions.get(name) for name in _VERSIONS}
    saved = {"target": plan.target, "model": plan.model, "machine": plan.machine, "versions": versions}
    found = list(_differences(saved, own))
    if not found:
        _check_weights(plan, model)
        return
    lines = [f"{name}: saved {then}, now {now}" for name, then, now in found[:6]]
    if len(found) > len(lines):
        lines.append(f"and {len(found) - len(lines)} more")
    fields = {name.split(".")[0] for name, _, _ in found}
    hint = "load it with the model that it was made for, or optimize this one"
    if fields == {"machine"}:
        hint = "optimize the model again on this machine"
        if [name for name, _, _ in found] == ["machine.threads"]:
            hint = f"call torch.set_num_threads({plan.machine['threads']}), or optimize the model again"
    elif fields <= {"versions", "machine"}:
        hint = "optimize the model again with these versions"
    raise PlanError(
        f"the saved plan is for another {' and '.join(sorted(fields))}: {'; '.join(lines)}",
        where=str(plan.directory),
        hint=hint,
    )


def _is_target(plan: SavedPlan, device: torch.device) -> bool:
    """Whether a device is the one that a plan was made for, on another machine."""
    if device.type != "cuda":
        return False
    found = torch.cuda.get_device_properties(device)
    target = match_device(found.name, found.total_memory)
    return target is not None and target.name == plan.target


def _check_weights(plan: SavedPlan, model: PreTrainedModel) -> None:
    """Losses were measured, and tables computed, with certain weights."""
    if plan.weights is None or plan.weights == weights_digest(model_tensors(model)):
        return
    lossy = ", ".join(lossy_passes(plan.passes))
    why = f"the loss of {lossy} was measured with them" if lossy else "its passes computed tables from them"
    raise PlanError(
        f"the saved plan is for other weights of the same shapes: {why}",
        where=str(plan.directory),
        hint="load it with the weights that it was made for, or optimize this model",
    )


def load_plan(
    directory: str | Path, model: PreTrainedModel, target: str | None = None
) -> tuple[SavedPlan, Graph | None]:
    """Read a plan, check that it is for this model and machine, and rebuild its graph.

    Raises:
        PlanError: see :func:`read_plan` and :func:`check_plan`.
    """
    plan = read_plan(directory)
    check_plan(plan, model, target)
    return plan, plan.graph(model)


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """What a plan depends on: class, configuration, and shape and dtype of every tensor."""
    tensors = {
        name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for name, t in model_tensors(model).items()
    }
    config = {k: v for k, v in clean_config(model.config).items() if k not in _GENERATION}
    return {"class": type(model).__name__, "config": config, "tensors": tensors}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Where a program runs: the processor and its threads, or the accelerator."""
    found: dict[str, Any] = {"device": device.type, "arch": platform.machine()}
    if device.type == "cuda":
        return {**found, "accelerator": torch.cuda.get_device_name(device)}
    return {**found, "cpu": cpu_name(), "threads": torch.get_num_threads()}


# --- files ---------------------------------------------------------------------------------------


def _read_document(directory: Path) -> dict[str, Any]:
    path = directory / PLAN
    if not path.is_file():
        missing = "there is no such folder" if not directory.exists() else f"it holds no {PLAN}"
        raise PlanError(
            f"not a saved plan: {missing}", where=str(directory), hint="pass a folder that save() has written"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    document = _parse(content, path)
    if document.get("schema") != SCHEMA:
        raise PlanError(
            f"not a plan of this version: found {document.get('schema')!r}, this version reads {SCHEMA!r}",
            where=str(path),
            hint=_AGAIN,
        )
    if document.get("checksum") != _checksum(document):
        raise _damaged(path, "it does not match its checksum")
    for key, kind in {**_DECIDED, **_ADDED}.items():
        if not isinstance(document.get(key), kind):
            raise _damaged(path, f"it has no {key}")
    return document


def _read_file(directory: Path, name: str, digest: str) -> bytes:
    path = directory / name
    if name not in _FILES and not _KERNELS.fullmatch(name):
        raise _damaged(directory / PLAN, f"it names a file {name!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise _damaged(path, f"it does not match its checksum in {PLAN}")
    return content


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise _damaged(path, "it is not a JSON object")
    return document


def _damaged(path: Path, what: str) -> PlanError:
    return PlanError(f"the saved plan was cut off or edited: {what}", where=str(path), hint=_AGAIN)


def _checksum(document: Mapping[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_place(directory: Path) -> None:
    """Only a new or empty folder, or an earlier plan and nothing else, may be written over."""
    if not directory.exists() and not directory.is_symlink():
        return
    found = {path.name for path in directory.iterdir()} if directory.is_dir() else {directory.name}
    if directory.is_dir() and (not found or (PLAN in found and found <= {*_FILES, "kernels"})):
        return
    others = ", ".join(sorted(found - _FILES - {"kernels"})[:4]) or "files of another program"
    raise PlanError(
        f"the folder is not a saved plan and is left as it is: it holds {others}",
        where=str(directory),
        hint="save to a new folder",
    )


def _write_folder(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write beside, then rename: an interruption leaves the old plan or the new one."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:12]}.tmp")
    old = fresh.with_suffix(".old")
    try:
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(content)
        if directory.exists():
            directory.rename(old)
        try:
            fresh.rename(directory)
        except BaseException:
            if old.exists():
                old.rename(directory)
            raise
    finally:
        for leftover in (fresh, old):
            with contextlib.suppress(OSError):
                shutil.rmtree(leftover)


def _differences(saved: Any, own: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field that differs: its dotted name, the saved value and this one."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted({*saved, *own}):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(saved.get(key), own.get(key), inner)
    elif saved != own:
        then, now = ("nothing" if v is None else str(v)[:120] for v in (saved, own))
        yield name, then, now
