"""What a program keeps in memory: weights, cache and workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
from torch.fx.node import Node

from graphwright.cost_model.cost import B
from graphwright.cost_model.workspace import Workspace, workspace
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, ancestors, argument, module_path

#: Slots of a cache, per sequence.
S = sympy.Symbol("S", positive=True)
_UNBOUNDED = 2**31


def window_slack(window: int) -> int:
    """Slots that a store keeps beyond a window, for the step's own tokens: as ``runtime/storage.py`` does."""
    return max(64, min(512, window))


@dataclass(frozen=True)
class StoreSpec:
    """One tensor that a program keeps for every token.

    Args:
        name: which, e.g. ``layers.3.keys``.
        elements_per_token: of one sequence.
        dtype_bytes: bytes of an element, scales and the like spread over them; may be a fraction.
        window: tokens that are needed; 0 means all.
        heads: into how many parts devices can divide it; 1 for a latent, which each device needs whole.
    """

    name: str
    elements_per_token: int
    dtype_bytes: float
    window: int = 0
    heads: int = 1

    def __post_init__(self) -> None:
        if min(self.elements_per_token, self.dtype_bytes, self.heads) <= 0 or self.window < 0:
            raise InputError(
                "a store needs elements, bytes and heads above zero and a window of at least zero",
                where=f"StoreSpec {self.name!r}",
            )

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes."""
        return self.elements_per_token * self.dtype_bytes

    def slots(self, capacity: int, slack: int | None = None) -> int:
        """Slots per sequence: the capacity, or the window and its slack if that is less."""
        return min(capacity, self.most_slots(slack)) if self.window else capacity

    def most_slots(self, slack: int | None = None) -> int:
        """Slots per sequence of a store with a window: it and ``slack``, :func:`window_slack` by default."""
        return self.window + (window_slack(self.window) if slack is None else slack)

    def on_device(self, degree: int) -> StoreSpec:
        """What one of ``degree`` devices keeps: its heads, rounded up; at least one, or the whole latent."""
        own = -(-self.heads // degree)
        return replace(self, elements_per_token=self.elements_per_token // self.heads * own, heads=own)


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
    heads, features = int(fake.shape[1]), int(fake.shape[3])
    return StoreSpec(name, heads * features, fake.dtype.itemsize, window, heads)


def cache_bytes_per_token(graph: Graph) -> int:
    """Bytes that the keys and values of one token take in all layers, while no window is full."""
    return int(sum(store.bytes_per_token for store in default_stores(graph)))


def cache_bytes(stores: Sequence[StoreSpec], batch: int, capacity: int, slack: int | None = None) -> int:
    """Bytes of all stores for so many sequences of so many tokens."""
    return int(sum(batch * store.slots(capacity, slack) * store.bytes_per_token for store in stores))


def cache_expression(stores: Sequence[StoreSpec], slack: int | None = None) -> sympy.Expr:
    """Bytes of all stores as an expression in the batch B and the capacity S."""
    groups: dict[int, float] = {}
    for store in stores:
        most = store.most_slots(slack) if store.window else 0
        groups[most] = groups.get(most, 0) + store.bytes_per_token
    slots = {most: sympy.Min(S, most) if most else S for most in groups}
    return B * sympy.Add(*(slots[most] * sympy.nsimplify(size) for most, size in groups.items()))


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
    step = workspace(graph, step_tokens)
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
