"""What a program keeps in memory: weights, cache and workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx.node import Node

from graphwright.cost_model.stores import StoreSpec, cache_bytes, default_stores
from graphwright.cost_model.workspace import Workspace, workspace
from graphwright.ir.graph import Graph

_UNBOUNDED = 2**31


@dataclass(frozen=True)
class Memory:
    """Memory of one workload on one target, in bytes.

    Args:
        weights_bytes: parameters, each storage once.
        cache_bytes: every store at the workload's batch and capacity.
        workspace_bytes: the most that activations hold at one time in the largest step.
        limit_bytes: what may be used.
        largest_batch: the most sequences of the workload's capacity that fit; 0 if none.
        largest_context: the most tokens per sequence that fit at the workload's batch; None if nothing
            but the model's positions bounds it.
    """

    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    limit_bytes: int
    largest_batch: int
    largest_context: int | None

    @property
    def total_bytes(self) -> int:
        """Weights, cache and workspace: the peak, reached in the largest step."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes

    @property
    def fits(self) -> bool:
        """Whether the total is within the limit."""
        return self.total_bytes <= self.limit_bytes


# --- weights and cache ---------------------------------------------------------------------------


def weights_bytes(graph: Graph) -> int:
    """Bytes of the graph's parameters; tensors that share a storage (tied ones) count once."""
    storages = [tensor.untyped_storage() for tensor in graph.parameters.values()]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


# --- does it fit ---------------------------------------------------------------------------------


def step_workspace(
    graph: Graph, stores: Sequence[StoreSpec], tokens: int, shares: Mapping[Node, float] | None = None
) -> Workspace:
    """:func:`workspace` of a step, with what stores take for its tokens beyond a decode step's.

    Args:
        graph, tokens, shares: as in ``workspace``.
        stores: what the cache keeps.
    """
    step = workspace(graph, tokens, shares).plus(sum(store.step_bytes(tokens) for store in stores))
    fixed, each = (sum(parts) for parts in zip((0.0, 0.0), *(s.prompt_line() for s in stores), strict=True))
    return step.or_plus(fixed, each) if each else step


def plan_memory(
    graph: Graph,
    *,
    batch: int,
    capacity: int,
    limit: int,
    step_tokens: int,
    stores: Sequence[StoreSpec] | None = None,
    max_positions: int | None = None,
    slack: int | None = None,
) -> Memory:
    """Memory of a workload, and how far batch and context could grow.

    Args:
        graph: captured or rewritten, on any device (``meta`` too).
        batch, capacity: sequences, and cache slots of each.
        limit: bytes that may be used.
        step_tokens: tokens per sequence of the largest step (a prefill chunk).
        stores: what the cache keeps; keys and values by default.
        max_positions: the model's positions, which bound the context.
        slack: tokens beyond a window that its cache holds; :func:`window_slack` by default.
    """
    stores = default_stores(graph) if stores is None else stores
    step = step_workspace(graph, stores, step_tokens)
    return add_up(weights_bytes(graph), step, stores, batch, capacity, limit, max_positions, slack)


def add_up(
    weights: int,
    step: Workspace,
    stores: Sequence[StoreSpec],
    batch: int,
    capacity: int,
    limit: int,
    max_positions: int | None = None,
    slack: int | None = None,
) -> Memory:
    """:func:`plan_memory` where the bytes of the weights and the workspace of a step are known."""

    def fits(sequences: int, slots: int) -> bool:
        used = weights + step.bytes(sequences, slots) + cache_bytes(stores, sequences, slots, slack)
        return used <= limit

    longest = _largest(lambda slots: fits(batch, slots))
    context = None if longest >= _UNBOUNDED else longest
    if max_positions is not None:
        context = min(longest, max_positions)
    return Memory(
        weights_bytes=weights,
        cache_bytes=cache_bytes(stores, batch, capacity, slack),
        workspace_bytes=step.bytes(batch, capacity),
        limit_bytes=limit,
        largest_batch=_largest(lambda sequences: fits(sequences, capacity)),
        largest_context=context,
    )


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if each number below it does too; 0 if not even 1 fits."""
    low, high = 0, 1
    while high < _UNBOUNDED and fits(high):
        low, high = high, high * 2
    if high >= _UNBOUNDED:
        return _UNBOUNDED
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
