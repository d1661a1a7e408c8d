"""What a program keeps in memory: weights, cache and workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import find_head
from graphwright.cost_model.shapes import Shapes, is_free, source, tensors
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, ancestors, argument, module_path

#: Slots of a cache, per sequence.
S = sympy.Symbol("S", positive=True)
# A window's cache also holds the step's own tokens before the oldest ones may be overwritten.
WINDOW_SLACK = 64
_UNBOUNDED = 2**31


@dataclass(frozen=True)
class StoreSpec:
    """One tensor that a program keeps for every token.

    Args:
        name: which, e.g. ``layers.3.keys``.
        elements_per_token: of one sequence.
        dtype_bytes: bytes of an element, scales and the like spread over them; may be a fraction.
        window: tokens that are needed; 0 means all.
    """

    name: str
    elements_per_token: int
    dtype_bytes: float
    window: int = 0

    def __post_init__(self) -> None:
        if self.elements_per_token <= 0 or self.dtype_bytes <= 0 or self.window < 0:
            raise InputError(
                "a store needs elements and bytes above zero and a window of at least zero",
                where=f"StoreSpec {self.name!r}",
            )

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes."""
        return self.elements_per_token * self.dtype_bytes

    def slots(self, capacity: int, slack: int = WINDOW_SLACK) -> int:
        """Slots per sequence: the capacity, or the window and its slack if that is less."""
        return min(capacity, self.window + slack) if self.window else capacity


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
        """Weights, cache and workspace."""
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


def default_stores(graph: Graph) -> list[StoreSpec]:
    """What the graph's cache keeps: its state if it has any, else the keys and values of each attention."""
    stores: dict[str, StoreSpec] = {}
    for node in graph.calls("cache_attention", "append_attention"):
        read = ancestors([argument(node, "keys"), argument(node, "values")])
        for state in (n for n in graph.placeholders("state") if n in read):
            # Read by layers with and without a window, a store keeps everything.
            windows = [argument(node, "window")]
            windows += [stores[state.meta["name"]].window] if state.meta["name"] in stores else []
            window = max(windows) if all(windows) else 0
            stores[state.meta["name"]] = _store(state.meta["name"], state, window)
    for index, node in enumerate(graph.calls("attention")):
        site = module_path(node) or f"attention.{index}"
        for label, name in (("keys", "k"), ("values", "v")):
            spec = _store(f"{site}.{label}", argument(node, name), argument(node, "window"))
            stores[spec.name] = spec
    return list(stores.values())


def _store(name: str, node: Node, window: int) -> StoreSpec:
    """The store of a value ``[B, G, tokens, D]``."""
    fake = node.meta["val"]
    return StoreSpec(name, int(fake.shape[1]) * int(fake.shape[3]), fake.dtype.itemsize, window)


def cache_bytes_per_token(graph: Graph) -> int:
    """Bytes that the keys and values of one token take in all layers, while no window is full."""
    return int(sum(store.bytes_per_token for store in default_stores(graph)))


def cache_bytes(stores: Sequence[StoreSpec], batch: int, capacity: int, slack: int = WINDOW_SLACK) -> int:
    """Bytes of all stores for so many sequences of so many tokens."""
    return int(sum(batch * store.slots(capacity, slack) * store.bytes_per_token for store in stores))


def cache_expression(stores: Sequence[StoreSpec], slack: int = WINDOW_SLACK) -> sympy.Expr:
    """Bytes of all stores as an expression in the batch B and the capacity S."""
    groups: dict[int, float] = {}
    for store in stores:
        groups[store.window] = groups.get(store.window, 0) + store.bytes_per_token
    slots = {window: sympy.Min(S, window + slack) if window else S for window in groups}
    return B * sympy.Add(*(slots[w] * sympy.nsimplify(size) for w, size in groups.items()))


# --- workspace -----------------------------------------------------------------------------------


def workspace_bytes(graph: Graph, batch: int, tokens: int) -> int:
    """The most bytes of activations alive at one time, in a step that runs node by node.

    Views take nothing; a value dies after its last reader. Fusion only needs less. Logits count for the
    last token of each sequence only.
    """
    shapes = Shapes(graph)
    head = find_head(graph)
    sizes: dict[Node, int] = {}
    last: dict[Node, Node] = {}
    memo: dict[object, int] = {}
    after_head = False
    for node in graph.nodes:
        after_head = after_head or node is head
        for value in node.all_input_nodes:
            last[source(value)] = node
        if not is_free(node):
            rows = 1 if after_head else tokens
            sizes[node] = sum(_bytes(shapes, t, batch, rows, memo) for t in tensors(node))
    dying: dict[Node, int] = {}
    for node, reader in last.items():
        dying[reader] = dying.get(reader, 0) + sizes.get(node, 0)
    alive = most = 0
    for node in graph.nodes:
        alive += sizes.get(node, 0)
        most = max(most, alive)
        alive -= dying.get(node, 0)
    return most


def _bytes(shapes: Shapes, tensor: torch.Tensor, batch: int, tokens: int, memo: dict[object, int]) -> int:
    key = (shapes.nbytes(tensor), tokens)
    if key not in memo:
        memo[key] = int(key[0].subs({B: batch, T: tokens, C: 0}))
    return memo[key]


# --- does it fit ---------------------------------------------------------------------------------


def plan_memory(
    graph: Graph,
    *,
    batch: int,
    capacity: int,
    limit: int,
    step_tokens: int,
    stores: Sequence[StoreSpec] | None = None,
    max_positions: int | None = None,
    slack: int = WINDOW_SLACK,
) -> Memory:
    """Memory of a workload, and how far batch and context could grow.

    Args:
        graph: captured or rewritten, on any device (``meta`` too).
        batch, capacity: sequences, and cache slots of each.
        limit: bytes that may be used.
        step_tokens: tokens per sequence of the largest step (a prefill chunk).
        stores: what the cache keeps; keys and values by default.
        max_positions: the model's positions, which bound the context.
        slack: tokens beyond a window that its cache holds.
    """
    stores = default_stores(graph) if stores is None else stores
    weights = weights_bytes(graph)
    # Activations grow in proportion to the batch.
    workspace = workspace_bytes(graph, 1, step_tokens)

    def fits(sequences: int, slots: int) -> bool:
        used = weights + sequences * workspace + cache_bytes(stores, sequences, slots, slack)
        return used <= limit

    longest = _largest(lambda slots: fits(batch, slots))
    context = None if longest >= _UNBOUNDED else longest
    if max_positions is not None:
        context = min(longest, max_positions)
    return Memory(
        weights_bytes=weights,
        cache_bytes=cache_bytes(stores, batch, capacity, slack),
        workspace_bytes=batch * workspace,
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
