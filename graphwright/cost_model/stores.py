"""What a cache keeps, store by store: elements, windows, and the pages of packed stores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import B
from graphwright.ir.codecs import parse_codec
from graphwright.ir.errors import InputError
from graphwright.ir.eviction_ops import HELD, KEPT, RING, STEP_TOKENS, Retention
from graphwright.ir.evictors import parse_evictor
from graphwright.ir.graph import Graph, ancestors, argument, module_path, op_name, value
from graphwright.ir.packed_ops import page_count, page_shape, tail_slots

#: Slots of a cache, per sequence.
S = sympy.Symbol("S", positive=True)


def window_slack(window: int) -> int:
    """Slots that a store keeps beyond a window, for the step's own tokens: as ``runtime/storage.py`` does."""
    return max(STEP_TOKENS, min(512, window))


@dataclass(frozen=True)
class Paging:
    """How a packed store keeps its tokens.

    Args:
        tokens: of a page.
        first: tokens at the start that are in no page.
        recent: newest tokens that stay in the tail beside the page that is being filled.
        full_bytes: of one token as it is, in the tail and among the first.
    """

    tokens: int
    first: int
    recent: int
    full_bytes: int

    def fixed_bytes(self, step_tokens: int = STEP_TOKENS) -> int:
        """Bytes of one sequence whatever its length: the tail, the first tokens, and how many are packed."""
        tail = tail_slots(self.tokens, self.first, self.recent, max(step_tokens, STEP_TOKENS))
        return (tail + self.first) * self.full_bytes + 8


@dataclass(frozen=True)
class Summarized:
    """What the entries of a summary stand for: ``span`` pages each, whole or not.

    Args:
        tokens: of a page.
        first: tokens at the start that are in no page.
        span: pages of an entry.
    """

    tokens: int
    first: int
    span: int

    def entries(self, slots: int) -> int:
        """Entries of one sequence of so many tokens."""
        return -(-page_count(slots, self.tokens, self.first, 0) // self.span)


@dataclass(frozen=True)
class StoreSpec:
    """One tensor that a program keeps for every token, or the parts of a packed one.

    Args:
        name: which, e.g. ``layers.3.keys``.
        elements_per_token: of one sequence; of a summary, elements of one entry.
        dtype_bytes: bytes of an element, scales and the like spread over them; may be a fraction.
        window: tokens that are needed; 0 means all.
        heads: into how many parts devices can divide it; 1 for a latent, which each device needs whole.
        paging: of a packed store; ``dtype_bytes`` is then of an element in a page.
        summarized: of a summary of pages, what an entry stands for.
        shared: tokens at the start that all sequences of a batch have in common, kept once.
        kept: how many tokens it holds, where tokens are evicted.
        fixed_slots: of what has so many slots whatever the capacity, such as a ring of queries.
    """

    name: str
    elements_per_token: int
    dtype_bytes: float
    window: int = 0
    heads: int = 1
    paging: Paging | None = None
    summarized: Summarized | None = None
    shared: int = 0
    kept: Retention | None = None
    fixed_slots: int = 0

    def __post_init__(self) -> None:
        if min(self.elements_per_token, self.dtype_bytes, self.heads) <= 0 or self.window < 0:
            raise InputError(
                "a store needs elements, bytes and heads above zero and a window of at least zero",
                where=f"StoreSpec {self.name!r}",
            )

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sequence takes; of a packed store, once it is in a page."""
        tokens = self.summarized.tokens * self.summarized.span if self.summarized else 1
        return self.elements_per_token * self.dtype_bytes / tokens

    def slots(self, capacity: int, slack: int | None = None) -> int:
        """Slots per sequence: the capacity, or the window and its slack if that is less.

        A packed store has the slots of whole pages.
        """
        if self.kept is not None or self.fixed_slots:
            return self.kept.slots(capacity) if self.kept is not None else self.fixed_slots
        slots = min(capacity, self.most_slots(slack)) if self.window else capacity
        if self.paging is None:
            return slots
        return self.paging.tokens * page_count(slots, self.paging.tokens, self.paging.first, self.window)

    def most_slots(self, slack: int | None = None) -> int:
        """Slots per sequence of a store with a window: it and ``slack``, :func:`window_slack` by default."""
        return self.window + (window_slack(self.window) if slack is None else slack)

    def nbytes(self, batch: int, capacity: int, slack: int | None = None) -> int:
        """Bytes for so many sequences of so many tokens: what the runtime allocates."""
        if self.summarized:
            return batch * self.summarized.entries(capacity) * self._entry_bytes
        fixed = self.paging.fixed_bytes() if self.paging else 0
        shared = min(self.shared, capacity)
        own = self.slots(capacity, slack) - shared
        # Bytes of a page are whole; spread over its elements they may be no exact binary fraction.
        return batch * (round(own * self.bytes_per_token) + fixed) + round(shared * self.bytes_per_token)

    @property
    def _entry_bytes(self) -> int:
        return round(self.elements_per_token * self.dtype_bytes)

    def step_bytes(self, step_tokens: int) -> int:
        """Bytes of one sequence that a step of so many tokens takes beyond :meth:`nbytes` while it runs."""
        if self.kept is not None:
            return round(max(step_tokens - STEP_TOKENS, 0) * self.bytes_per_token)
        if self.paging is None:
            return 0
        return self.paging.fixed_bytes(step_tokens) - self.paging.fixed_bytes()

    def expression(self, slack: int | None = None) -> sympy.Expr:
        """Bytes of one sequence's own as an expression in the capacity S; see :meth:`shared_expression`."""
        if self.summarized:
            tokens, first, span = self.summarized.tokens, self.summarized.first, self.summarized.span
            pages = sympy.ceiling((sympy.Max(S - first, 0) if first else S) / tokens)
            return sympy.ceiling(pages / span) * self._entry_bytes
        slots = sympy.Min(S, self.most_slots(slack)) if self.window else S
        if self.shared:
            slots = sympy.Max(S - self.shared, 0)
        if self.kept is not None:
            slots = sympy.Min(S, self.kept.expression(S))
        if self.fixed_slots:
            slots = sympy.Integer(self.fixed_slots)
        if self.paging is None:
            return slots * sympy.nsimplify(self.bytes_per_token)
        page, first = self.paging.tokens, 0 if self.window else self.paging.first
        pages = sympy.ceiling((sympy.Max(slots - first, 0) if first else slots) / page)
        page_bytes = round(page * self.bytes_per_token)
        return (pages + (1 if self.window else 0)) * page_bytes + self.paging.fixed_bytes()

    def shared_expression(self) -> sympy.Expr:
        """Bytes that all sequences have in common, as an expression in the capacity S."""
        if not self.shared:
            return sympy.Integer(0)
        return sympy.Min(S, self.shared) * sympy.nsimplify(self.bytes_per_token)

    def prompt_line(self) -> tuple[float, float]:
        """Bytes of one sequence beyond :meth:`nbytes` while a prompt stays whole: fixed, and of each slot."""
        if self.kept is None or self.kept.when != "prompt":
            return 0.0, 0.0
        fraction = 0.0 if self.kept.tokens else self.kept.keep
        fixed = (self.kept.tokens + self.kept.slack) * self.bytes_per_token
        return -fixed, (1 - fraction) * self.bytes_per_token

    def on_device(self, degree: int) -> StoreSpec:
        """What one of ``degree`` devices keeps: its heads, rounded up; at least one, or the whole latent."""
        own = -(-self.heads // degree)
        paging = self.paging
        if paging is not None:
            paging = replace(paging, full_bytes=paging.full_bytes // self.heads * own)
        elements = self.elements_per_token // self.heads * own
        return replace(self, elements_per_token=elements, heads=own, paging=paging)


# --- of a graph ----------------------------------------------------------------------------------


def default_stores(graph: Graph) -> list[StoreSpec]:
    """What the graph's cache keeps: its state if it has any, else the keys and values of each attention."""
    stores: dict[str, StoreSpec] = {}
    states = graph.placeholders("state")
    plain = [n for n in states if "store" not in n.meta]
    for node in graph.calls("cache_attention", "append_attention", "prefix_attention", "prefill_attention"):
        read = ancestors([argument(node, "keys"), argument(node, "values")]) if plain else set()
        for state in (n for n in plain if n in read):
            # Read by layers with and without a window, a store keeps everything.
            windows = [0 if op_name(node) == "prefix_attention" else argument(node, "window")]
            windows += [stores[state.meta["name"]].window] if state.meta["name"] in stores else []
            window = max(windows) if all(windows) else 0
            stores[state.meta["name"]] = _store(state.meta["name"], state, window)
    for about in (n.meta["store"] for n in states if n.meta.get("store", {}).get("role") == "prefix"):
        if about["of"] in stores:
            stores[about["of"]] = replace(stores[about["of"]], shared=about["tokens"])
    for spec in (*_packed_stores(states), *_evicted_stores(states)):
        stores[spec.name] = spec
    for spec in _beside_keys(states):
        stores[spec.name] = spec
    for index, node in enumerate(graph.calls("attention")):
        site = module_path(node) or f"attention.{index}"
        for label, name in (("keys", "k"), ("values", "v")):
            spec = _store(f"{site}.{label}", argument(node, name), argument(node, "window"))
            stores[spec.name] = spec
    return list(stores.values())


def _store(name: str, node: Node, window: int) -> StoreSpec:
    """The store of a value ``[B, G, tokens, D]``."""
    fake = value(node)
    heads, features = int(fake.shape[1]), int(fake.shape[3])
    return StoreSpec(name, heads * features, fake.dtype.itemsize, window, heads)


def _packed_stores(states: Iterable[Node]) -> list[StoreSpec]:
    """The packed stores, each described by its tail."""
    found = []
    for node in states:
        about = node.meta.get("store", {})
        if about.get("role") != "tail":
            continue
        tail, codec = value(node), parse_codec(about["codec"])
        shape = page_shape(tail, about["page"])
        # Devices divide a page where each of its buffers has the heads apart.
        heads = {size[0] if size else 1 for size, _ in codec.layout(shape).values()}
        ways = shape.groups if heads == {shape.groups} else 1
        elements = shape.groups * shape.features
        spread = codec.page_bytes(shape) / shape.values
        paging = Paging(shape.tokens, about["first"], about["recent"], elements * tail.dtype.itemsize)
        found.append(StoreSpec(about["name"], elements, spread, node.meta["window"], ways, paging))
    return found


def _evicted_stores(states: Iterable[Node]) -> list[StoreSpec]:
    """Stores that hold fewer tokens, and what comes with them: a length, queries, and what is noted."""
    found = []
    for node in states:
        about, name, fake = node.meta.get("store", {}), node.meta["name"], value(node)
        if about.get("role") == KEPT:
            kept, heads = Retention.of(about), int(fake.shape[1])
            elements = heads * int(fake.shape[3])
            found.append(StoreSpec(name, elements, fake.dtype.itemsize, heads=heads, kept=kept))
            if about["part"] == "keys" and parse_evictor(about["method"]).accumulates:
                found.append(StoreSpec(f"{about['name']}.noted", heads, 4, heads=heads, kept=kept))
        elif about.get("role") == RING:
            heads, slots, features = map(int, fake.shape[1:])
            size = heads * features
            found.append(StoreSpec(name, size, fake.dtype.itemsize, heads=heads, fixed_slots=slots))
        elif about.get("role") == HELD:
            found.append(StoreSpec(name, 1, fake.dtype.itemsize, fixed_slots=1))
    return found


def _beside_keys(states: Sequence[Node]) -> list[StoreSpec]:
    """What selecting pages keeps: their summaries, and the token ids that some of these are made with."""
    found = []
    heads = {n.meta["name"].removesuffix(".tail"): value(n).shape[1] for n in states if value(n).dim() == 4}
    for node in states:
        about, name, fake = node.meta.get("store", {}), node.meta["name"], value(node)
        if about.get("role") == "tokens":
            found.append(StoreSpec(name, 1, fake.dtype.itemsize))
        if about.get("role") != "summary":
            continue
        size = [int(n) for n in fake.shape[2:]]
        summarized = Summarized(about["page"], about["first"], about["span"])
        # Devices divide it where it has the heads of its keys apart.
        ways = size[0] if size[0] == heads.get(about["name"]) else 1
        elements = torch.Size(size).numel()
        found.append(StoreSpec(name, elements, fake.dtype.itemsize, heads=ways, summarized=summarized))
    return found


# --- of all stores -------------------------------------------------------------------------------


def cache_bytes_per_token(graph: Graph) -> int:
    """Bytes that the keys and values of one token take in all layers, while no window is full.

    Of packed stores, in a page: their tails are part of :func:`cache_bytes`.
    """
    return round(sum(s.bytes_per_token for s in default_stores(graph) if not s.fixed_slots))


def cache_bytes(stores: Sequence[StoreSpec], batch: int, capacity: int, slack: int | None = None) -> int:
    """Bytes of all stores for so many sequences of so many tokens, as the runtime allocates them."""
    return sum(store.nbytes(batch, capacity, slack) for store in stores)


def cache_expression(stores: Sequence[StoreSpec], slack: int | None = None) -> sympy.Expr:
    """Bytes of all stores as an expression in the batch B and the capacity S."""
    own = B * sympy.Add(*(store.expression(slack) for store in stores))
    return own + sympy.Add(*(store.shared_expression() for store in stores))
