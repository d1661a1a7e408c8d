"""What the report prints and draws of a cost: expressions with their values, the roofline, memory.

Everything here is plain data: text, numbers, lists and dictionaries, with the unit in the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from graphwright.cost_model.cost import OFF_CHIP, Expr
from graphwright.cost_model.estimate import _CHUNK
from graphwright.cost_model.graph_cost import GraphCost
from graphwright.cost_model.memory import step_workspace, weights_bytes
from graphwright.cost_model.prediction import main_dtype, off_chip_bytes, predict
from graphwright.cost_model.stores import StoreSpec, cache_bytes, default_stores
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph

# Enough for a smooth line, and every knee of a window shows.
_POINTS = 32


def describe_cost(
    cost: GraphCost, target: Target, phase: str, *, batch: int, context: float, tokens: int
) -> dict[str, Any]:
    """One phase's cost as expressions in B, C and T, and its value, as ``Report.costs`` holds it.

    Args:
        cost: of the graph.
        target: the machine, for the seconds.
        phase: ``decode``, ``verify`` or ``prefill``, as in :meth:`GraphCost.phase`.
        batch, context: sequences, and tokens of each in the cache before the step.
        tokens: new tokens per sequence; a decode step has one, whatever is given.

    Returns:
        ``expression`` (``flops`` by dtype, ``read`` and ``written`` by kind, in bytes, and ``launches``,
        each as text), ``at`` (the batch, context and tokens of the value) and ``value`` (``flops``,
        ``bytes_read``, ``bytes_written``, ``launches`` and ``seconds`` of one step). Activations, which
        stay on the chip, are in neither.

    Raises:
        InputError: no such phase.
    """
    tokens = 1 if phase == "decode" else tokens
    whole = cost.cost(phase)
    at = {"batch": batch, "context": context, "tokens": tokens}
    values = whole.at(batch=batch, context=context, tokens=tokens)
    step = predict(cost, target, batch=batch, context=context, tokens=tokens, phase=phase)
    return {
        "expression": {
            "flops": _texts(whole.flops),
            "read": _texts({kind: whole.read[kind] for kind in OFF_CHIP if kind in whole.read}),
            "written": _texts({kind: whole.written[kind] for kind in OFF_CHIP if kind in whole.written}),
            "launches": str(whole.launches),
        },
        "at": {**at, "context": float(context)},
        "value": {
            "flops": values.total_flops,
            "bytes_read": values.bytes_read,
            "bytes_written": values.bytes_written,
            "launches": values.launches,
            "seconds": step.seconds,
        },
    }


def _texts(parts: Mapping[str, Expr]) -> dict[str, str]:
    return {name: str(sympy.factor_terms(expr.expand())) for name, expr in parts.items()}


def roofline_curve(
    cost: GraphCost, target: Target, *, batch: int, context: float, tokens: int = 1
) -> dict[str, Any]:
    """Each group of ops on the target's roofline (Williams, Waterman and Patterson 2009).

    Args:
        cost: of the graph.
        target: the machine.
        batch, context, tokens: of the step, as in :func:`~graphwright.cost_model.prediction.predict`.

    Returns:
        ``flops_per_second`` and ``bytes_per_second``, the two roofs: the peak of the dtype that does most of
        the arithmetic, and the rate at which a step of this size reads. ``ops``: for each group its
        ``intensity`` (operations per byte), and the predicted ``flops_per_second``, ``bytes_per_second`` and
        ``seconds``. An op that moves nothing to or from memory is placed by the activations that it moves
        on the chip. One that does no arithmetic has no place on a roofline and is left out.
    """
    place: dict[str, Any] = {"batch": batch, "context": context, "tokens": tokens}
    step = predict(cost, target, **place)
    ops = []
    for name, part in cost.by_op.items():
        values, seconds = part.at(**place), step.by_op[name]
        moved = off_chip_bytes(values, target) or values.activation_bytes
        if values.total_flops and moved and seconds:
            ops.append({
                "op": name,
                "intensity": values.total_flops / moved,
                "flops_per_second": values.total_flops / seconds,
                "bytes_per_second": moved / seconds,
                "seconds": seconds,
            })  # fmt: skip
    dtype = main_dtype([cost.total.at(**place)])
    return {
        "flops_per_second": target.flops_rate(dtype),
        "bytes_per_second": target.read_rate(step.bytes_read),
        "ops": ops,
    }


def memory_curve(
    graph: Graph,
    target: Target,
    workload: Workload,
    *,
    stores: Sequence[StoreSpec] | None = None,
    limit_bytes: int,
    max_positions: int | None = None,
    step_tokens: int | None = None,
) -> dict[str, Any]:
    """Memory against context, for the workload's batch.

    Args:
        graph: captured or rewritten.
        target: the machine, which decides how many tokens a prefill step has.
        workload: its batch; its own length is among the points.
        stores: what the cache keeps; keys and values by default.
        limit_bytes: what may be used.
        max_positions: where the curve ends; at four times the workload's length by default.
        step_tokens: tokens per sequence of the largest step; a prefill step's by default.

    Returns:
        ``points`` with ``context`` (tokens per sequence, ascending), ``weights_bytes``, ``cache_bytes`` and
        ``workspace_bytes``; and ``limit_bytes``.
    """
    stores = default_stores(graph) if stores is None else stores
    chunk = step_tokens or min(workload.prompt, graph.annotations.get("prefill_chunk", _CHUNK[target.kind]))
    weights, step = weights_bytes(graph), step_workspace(graph, stores, chunk)
    capacity = workload.capacity
    last = max(max_positions or 4 * capacity, capacity)
    knees = {store.most_slots() for store in stores if store.window and store.most_slots() < last}
    contexts = {max(1, last * index // _POINTS) for index in range(_POINTS + 1)} | {capacity} | knees
    points = [
        {
            "context": context,
            "weights_bytes": weights,
            "cache_bytes": cache_bytes(stores, workload.batch, context),
            "workspace_bytes": step.bytes(workload.batch, context),
        }
        for context in sorted(contexts)
    ]
    return {"points": points, "limit_bytes": limit_bytes}
