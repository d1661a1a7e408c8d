"""Where one limit gives way to another: the batch and the context at which a program changes character.

Everything is read from the graph's cost by bisection with the predictor; the graph is not walked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphwright.cost_model.cost import CACHE, WEIGHTS, Cost
from graphwright.cost_model.graph_cost import GraphCost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.speculation import Acceptance, best_length, predict_speculation
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload

#: How far batch and context are searched, where nothing else bounds them.
LARGEST_BATCH, LONGEST_CONTEXT = 2**16, 2**20


# --- finding edges -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breakeven:
    """Between which sizes something holds.

    Args:
        starts: the smallest size at which it holds; None if it never does.
        stops: the smallest size from which on it no longer holds; None if it never stops, or never holds.
    """

    starts: int | None
    stops: int | None

    @property
    def never(self) -> bool:
        """It holds at no size."""
        return self.starts is None

    @property
    def always(self) -> bool:
        """It holds at every size."""
        return self.starts == 1 and self.stops is None


def breakeven(holds: Callable[[int], bool], limit: int) -> Breakeven:
    """Where something starts and stops to hold, for sizes from 1 to ``limit``.

    Sizes that double are tried, and the two edges are then found by bisection. Speculation with routed
    experts may pay in the middle only: small batches read more experts to verify than to decode, and large
    ones are bound by arithmetic (MoESD, Huang et al. 2025).
    """
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(2 * sizes[-1], limit))
    found = [at for at, size in enumerate(sizes) if holds(size)]
    if not found:
        return Breakeven(None, None)
    first, last = found[0], found[-1]
    starts = 1 if first == 0 else _edge(holds, sizes[first - 1], sizes[first])
    if last == len(sizes) - 1:
        return Breakeven(starts, None)
    return Breakeven(starts, _edge(lambda size: not holds(size), sizes[last], sizes[last + 1]))


def _edge(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest size above ``low`` that something holds at, if it holds at ``high`` and not at ``low``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def speculation_range(
    cost: GraphCost | Cost,
    target: Target,
    acceptance: Acceptance,
    drafts: int,
    quantity: str,
    *,
    batch: int = 1,
    context: float = 0,
    limit: int | None = None,
    draft_seconds: float = 0.0,
    hit_rate: float = 1.0,
) -> Breakeven:
    """The batches, or the contexts, at which drafting is faster than plain decoding.

    Args:
        cost, target, acceptance, drafts, draft_seconds, hit_rate: as in
            :func:`~graphwright.cost_model.speculation.predict_speculation`.
        quantity: ``batch`` or ``context``: which one varies.
        batch, context: the one that does not.
        limit: the largest size tried; 65,536 sequences or 1,048,576 tokens by default.
    """

    def pays(size: int) -> bool:
        place = {"batch": batch, "context": context} | {quantity: size}
        price = predict_speculation(
            cost, target, acceptance, drafts,
            batch=int(place["batch"]), context=place["context"],
            draft_seconds=draft_seconds, hit_rate=hit_rate,
        )  # fmt: skip
        return price["speedup"] > 1

    return breakeven(pays, limit or (LARGEST_BATCH if quantity == "batch" else LONGEST_CONTEXT))


# --- the list ------------------------------------------------------------------------------------


def crossovers(
    cost: GraphCost,
    target: Target,
    workload: Workload,
    *,
    acceptance: Acceptance | None = None,
    drafts: int | None = None,
    max_positions: int | None = None,
    draft_seconds: float = 0.0,
    hit_rate: float = 1.0,
    memory: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The batches and contexts at which a limit gives way to another, as ``Report.crossovers`` holds them.

    Args:
        cost: of the graph.
        target: the machine.
        workload: its batch holds while the context varies, and its mean context while the batch does.
        acceptance: of the drafts; without it nothing is said about speculation.
        drafts: tokens in a draft; by default as many as are best for the workload, at least one.
        max_positions: the model's positions, which bound the context; 1,048,576 tokens by default.
        draft_seconds, hit_rate: as in :func:`~graphwright.cost_model.speculation.predict_speculation`.
        memory: ``estimate()["memory"]``; without it nothing is said about the cache outgrowing it.

    Returns:
        Entries with ``what`` happens, the ``quantity`` (``batch`` or ``context``), its smallest ``value``
        at which it happens (None if at none, or, for speculation, if it always pays), and a ``note``.
    """
    longest = max_positions or LONGEST_CONTEXT
    found = [
        _compute_bound(cost, target, workload),
        _cache_over_weights(cost, target, workload, longest),
    ]
    if memory is not None:
        found.append(_memory_full(memory, workload, max_positions))
    if acceptance is None:
        return found
    context = workload.mean_context
    drafts = drafts or max(
        best_length(cost, target, acceptance, batch=workload.batch, context=context, hit_rate=hit_rate), 1
    )
    for quantity, limit in (("batch", LARGEST_BATCH), ("context", longest)):
        pays = speculation_range(
            cost, target, acceptance, drafts, quantity, batch=workload.batch, context=context, limit=limit,
            draft_seconds=draft_seconds, hit_rate=hit_rate,
        )  # fmt: skip
        found.append(_describe_speculation(pays, quantity, drafts, workload, limit))
    return found


def _compute_bound(cost: GraphCost, target: Target, workload: Workload) -> dict[str, Any]:
    context = workload.mean_context

    def holds(batch: int) -> bool:
        return predict(cost, target, batch=batch, context=context).bound == "compute"

    value = breakeven(holds, LARGEST_BATCH).starts
    at = f"at a context of {context:,.0f} tokens"
    if value is None:
        note = f"A decode step {at} is not compute-bound at any batch up to {LARGEST_BATCH:,}."
    else:
        note = f"From a batch of {value:,} on, a decode step {at} is compute-bound."
    return _entry("decode becomes compute-bound", "batch", value, note)


def _cache_over_weights(cost: GraphCost, target: Target, workload: Workload, longest: int) -> dict[str, Any]:
    parts = {kind: _reads_only(cost, kind) for kind in (CACHE, WEIGHTS)}

    def seconds(kind: str, context: int) -> float:
        place: dict[str, Any] = {"batch": workload.batch, "context": context, "tokens": 1}
        whole = cost.total.at(**place).bytes_read
        return predict(parts[kind], target, **place, step_bytes=whole).memory_seconds

    value = breakeven(lambda size: seconds(CACHE, size) > seconds(WEIGHTS, size), longest).starts
    at = f"at a batch of {workload.batch:,}"
    if value is None:
        note = (
            f"Reading the weights takes longer than reading the cache at any context up to {longest:,}, {at}."
        )
    else:
        note = f"From {value:,} tokens of context on, reading the cache takes longer than the weights, {at}."
    return _entry("reading the cache takes longer than reading the weights", "context", value, note)


def _reads_only(cost: GraphCost, kind: str) -> GraphCost:
    """Each group of ops without the bytes of other kinds; its arithmetic says which kernel it is."""
    members = {group: node for node, group in cost.groups.items()}
    parts = {
        members[group]: Cost(part.flops, {kind: part.read.get(kind, 0)}) for group, part in cost.by_op.items()
    }
    return GraphCost(parts, {node: cost.groups[node] for node in parts})


def _memory_full(memory: Mapping[str, Any], workload: Workload, positions: int | None) -> dict[str, Any]:
    largest, limit = memory["largest_context"], memory["limit_bytes"] / 1e9
    value = None if largest is None or (positions and largest >= positions) else largest + 1
    beside = f"{limit:.3g} GB at a batch of {workload.batch:,}"
    if largest == 0:
        note = f"Weights and workspace leave no room for a cache in {beside}."
    elif value is not None:
        note = f"From {value:,} tokens on, the cache no longer fits beside the weights in {beside}."
    elif positions:
        note = f"A cache of all {positions:,} positions fits in {beside}."
    else:
        note = f"Each layer keeps a window only, so that any context fits in {beside}."
    return _entry("the cache outgrows the memory", "context", value, note)


def _describe_speculation(
    pays: Breakeven, quantity: str, drafts: int, workload: Workload, limit: int
) -> dict[str, Any]:
    unit = "sequences" if quantity == "batch" else "tokens of context"
    fixed = (
        f"at a context of {workload.mean_context:,.0f} tokens"
        if quantity == "batch"
        else f"at a batch of {workload.batch:,}"
    )
    what = f"Drafting {drafts} token{'s' if drafts > 1 else ''}"
    if pays.never:
        note = f"{what} pays at no {quantity} up to {limit:,}, {fixed}."
    elif pays.always:
        note = f"{what} pays at every {quantity} up to {limit:,}, {fixed}."
    else:
        since = f"from {pays.starts:,} {unit} on" if pays.starts != 1 else ""
        until = f"below {pays.stops:,} {unit}" if pays.stops is not None else ""
        note = f"{what} pays {' and '.join(part for part in (since, until) if part)}, {fixed}."
    return _entry("speculation stops paying", quantity, pays.stops, note)


def _entry(what: str, quantity: str, value: int | None, note: str) -> dict[str, Any]:
    number = None if value is None else float(value)
    return {"what": what, "quantity": quantity, "value": number, "note": note}
