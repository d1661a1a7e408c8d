"""``torch.compile(model, backend="graphwright")``: the exact passes as a backend.

torch finds :func:`graphwright_backend` through the entry point ``torch_dynamo_backends``. dynamo's graph
becomes a :class:`~graphwright.ir.graph.Graph`, is canonicalized, gets kernels where they win, and
Inductor compiles it with the rest written out. What this route cannot carry goes to Inductor as it
came, and :func:`report` says why: nothing that Inductor compiles fails here.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.exc
import torch.fx
from torch._dynamo.backends.registry import lookup_backend

from graphwright.ir.canonicalize import CanonicalizationReport, canonicalize
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph
from graphwright.ir.printer import to_python
from graphwright.optimizer.backend_graph import NotExpressible, export_graph, import_graph, keep_aliases
from graphwright.optimizer.backend_lowering import MANY_ROWS, Lowered, lower_for_inductor, masked_attention
from graphwright.optimizer.backend_records import (
    GraphRecord,
    forget,
    merged_report,
    near_miss_of,
    open_record,
    owner_of,
    recall,
    remember,
)
from graphwright.optimizer.report import Report, Status

Compiled = Callable[..., Any]


def graphwright_backend(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compile one dynamo graph. torch calls it; users write ``torch.compile(f, backend="graphwright")``.

    Args:
        gm: dynamo's graph.
        example_inputs: its inputs; parameters are the user's own.
        mode, options: of ``torch.compile``, handed to Inductor.

    Returns:
        A function of the graph's inputs.
    """
    record = open_record(gm, example_inputs)
    patches = _inductor_options(mode, options)
    compiled = None
    reason = gradients_reason(gm, example_inputs)
    if reason is not None:
        record.decide("gradients", Status.FALLBACK, f"{reason}: Inductor compiles the graph untouched")
    else:
        compiled = _our_route(gm, example_inputs, patches, record)
    if compiled is None:
        with _timed(record, "inductor"):
            compiled = _inductor(gm, example_inputs, patches)
    remember(record)
    return compiled


# torch._dynamo.reset() drops every compiled graph, and calls this.
graphwright_backend.reset = forget  # type: ignore[attr-defined]


def report(compiled: Any) -> Report:
    """What was decided about a compiled model, one report for all of its graphs.

    Args:
        compiled: what ``torch.compile(..., backend="graphwright")`` or ``graphwright.optimize`` returned,
            or a module whose ``compile`` method or ``generate`` used the backend.

    Raises:
        InputError: nothing was compiled yet, or not with this backend.
    """
    own = getattr(compiled, "report", None)
    if isinstance(own, Report):
        return own
    owner = owner_of(compiled)
    records = recall(owner)
    if not records:
        name = type(owner).__name__ if isinstance(owner, torch.nn.Module) else repr(owner)
        raise InputError(
            "graphwright has compiled no graph of this",
            where=name,
            hint='use torch.compile(model, backend="graphwright") and call the result once before asking',
        )
    return merged_report(owner, records)


def gradients_reason(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> str | None:
    """Why a graph needs gradients; None if it does not."""
    needing = any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)
    if not needing:
        return None
    if torch.is_grad_enabled():
        return "gradients are enabled and an input requires them (call under torch.no_grad() for inference)"
    switched_on = any(
        n.op == "call_function" and n.target is torch._C._set_grad_enabled and n.args[:1] == (True,)
        for n in gm.graph.nodes
    )
    return "the graph enables gradients inside" if switched_on else None


# --- the route ------------------------------------------------------------------------------------


def _our_route(
    gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any], record: GraphRecord
) -> Compiled | None:
    """The graph rewritten and compiled; None if Inductor should take it as it came, with the reason noted."""
    try:
        with _timed(record, "capture"):
            imported = import_graph(gm, example_inputs)
        graph = imported.graph
        record.code_before = to_python(graph)
        with _timed(record, "canonicalize"):
            found = canonicalize(graph)
        _note_canonicalization(record, graph, found)
        if not found.counts:
            return None
        with _timed(record, "lower"):
            keep_aliases(imported)
            record.code_after = to_python(graph)
            lowered = lower_for_inductor(graph, _device(example_inputs))
            rewritten = export_graph(imported, lowered.module)
        _note_kernels(record, lowered)
        with _timed(record, "inductor"):
            compiled = _inductor(rewritten, example_inputs, patches)
    except torch._dynamo.exc.RestartAnalysis:
        raise  # dynamo's own control flow: it traces again and comes back
    except NotExpressible as error:
        _fall_back(record, error.what)
        return None
    except Exception as error:
        _fall_back(record, f"{type(error).__name__}: {_first_line(error)}")
        return None
    record.decide(
        "lower", Status.APPLIED, "the rest is written out and compiled by Inductor", fidelity="reordered"
    )
    return compiled


def _fall_back(record: GraphRecord, reason: str) -> None:
    """Forget what was noted of a route that was not taken."""
    record.decisions.clear()
    record.ops, record.kernels, record.code_after = {}, [], ""
    record.decide("graph", Status.FALLBACK, f"{reason}: Inductor compiles the graph untouched")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"


def _inductor(gm: torch.fx.GraphModule, example_inputs: list[Any], patches: dict[str, Any]) -> Compiled:
    return lookup_backend("inductor")(gm, example_inputs, **({"config_patches": patches} if patches else {}))


def _inductor_options(mode: str | None, options: dict[str, Any] | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    return {**patches, **{key.replace("-", "_"): value for key, value in (options or {}).items()}}


def _device(example_inputs: list[Any]) -> torch.device:
    devices = Counter(t.device for t in example_inputs if isinstance(t, torch.Tensor))
    accelerated = [device for device in devices if device.type != "cpu"]
    if len(accelerated) > 1:
        raise NotExpressible(f"it runs on several devices: {', '.join(map(str, accelerated))}")
    return accelerated[0] if accelerated else torch.device("cpu")


# --- what the report says -------------------------------------------------------------------------


def _note_canonicalization(record: GraphRecord, graph: Graph, found: CanonicalizationReport) -> None:
    record.ops = dict(found.counts)
    for op, count in found.counts.items():
        record.decide(f"canonicalize{{op={op}}}", Status.APPLIED, _calls(count), fidelity="reordered")
    if not found.counts:
        record.decide(
            "canonicalize",
            Status.NOT_FOUND,
            "the graph holds no semantic op: Inductor compiles it as it came",
        )
    record.near_misses = [str(miss) for miss in found.near_misses]
    record.near_misses += near_miss_of(masked_attention(graph))


def _note_kernels(record: GraphRecord, lowered: Lowered) -> None:
    for use in lowered.kernels:
        reason = f"{_calls(use.sites)}; {use.reason}"
        record.kernels.append({"op": use.op, "provider": use.provider, "reason": reason})
        status = Status.FALLBACK if use.provider == "reference" else Status.APPLIED
        record.decide(f"kernel{{op={use.op},provider={use.provider}}}", status, reason, fidelity="reordered")
    for reason, count in lowered.library.items():
        record.kernels.append(
            {"op": "linear", "provider": "inductor", "reason": f"{_calls(count)}; {reason}"}
        )
        status = Status.UNPROFITABLE if reason == MANY_ROWS else Status.FALLBACK
        if all("it does not serve" in refusal for refusal in reason.split("; ")):
            status = Status.NOT_FOUND  # no provider has kernels for this device: nothing is lost
        record.decide("kernel{op=linear}", status, f"{_calls(count)} left to Inductor: {reason}")


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


@contextlib.contextmanager
def _timed(record: GraphRecord, step: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[step] = record.seconds.get(step, 0.0) + time.perf_counter() - began
