"""``absorb_projections``: move the expansion of a stored latent from the cache onto the query.

When keys and values are projections of one stored latent c, every step expands them for all slots of
the cache. But ``q . (W c) = (W^T q) . c``: projecting the query once gives the same scores on the
latent itself, and as the softmax's weights sum to one, the value projection may follow the attention.
All heads then read one store, as in multi-query attention. Source: DeepSeek-V2 (2024), section 2.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import ACTIVATIONS, CACHE, WEIGHTS, B, C, Cost, Expr
from graphwright.cost_model.graph_cost import subgraph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.expansion import Expansion, Segment, Unexpected, find_expansion
from graphwright.passes.place_cache import add_store

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class AbsorbProjections(Pass):
    """Attend over the stored latent itself; project queries and outputs instead of all slots."""

    name: ClassVar[str] = "absorb_projections"
    summary: ClassVar[str] = "project queries instead of expanding the cache (latent attention)"
    fidelity: ClassVar[Fidelity] = "reordered"
    requires: ClassVar[frozenset[str]] = frozenset({"cache"})

    def find(self, graph: Graph) -> list[Site]:
        sites = []
        prices: dict[Any, Cost] = {}
        for index, attention in enumerate(graph.calls("cache_attention")):
            keys, values = argument(attention, "keys"), argument(attention, "values")
            if keys.op == "placeholder" and values.op == "placeholder":
                continue  # keys and values are stored: nothing is expanded
            if _read_as_is(keys) and _read_as_is(values):
                continue
            info: dict[str, Any] = {"graph": graph, "prices": prices}
            try:
                info["expansion"] = find_expansion(graph, attention)
            except Unexpected as obstacle:
                info["obstacle"] = str(obstacle)
            sites.append(Site(module_path(attention) or f"attention.{index}", (attention,), info))
        return sites

    def legal(self, site: Site) -> Verdict:
        found: Expansion | None = site.info.get("expansion")
        if found is None:
            return Verdict(False, site.info["obstacle"])
        attention = site.nodes[0]
        obstacle = _used_elsewhere(found, attention) or _bias_obstacle(found, attention)
        if obstacle:
            return Verdict(False, obstacle)
        shared = f" and {found.direct.width} shared ones" if found.direct else ""
        heads, kept = (
            int(value(argument(attention, "q")).shape[1]),
            f"{_width(found.latent)} features{shared}",
        )
        return Verdict(True, f"{heads} heads attend over the {kept} that are stored; no slot is expanded")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        before, after = _costs(site)
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}
        old, new = (predict(cost, target, **place).seconds for cost in (before, after))
        note = f"{old * 1e6:.1f} us a step with the expansion of all slots, {new * 1e6:.1f} us without"
        return CostDelta(new - old, 0.0, note)

    def apply(self, site: Site, graph: Graph) -> None:
        attention, found = site.nodes[0], site.info["expansion"]
        q = argument(attention, "q")
        store = _merge_stores(graph, site.name, found)
        rank, features = _width(found.latent), int(value(store).shape[3])
        seen = store
        if features > rank:
            seen = graph.emit(aten.slice.Tensor, store, 3, 0, rank, before=attention)
        rest = [argument(attention, name) for name in _AFTER_VALUES]
        heads = _Heads(graph, found, int(value(q).shape[1]), attention)
        attended = graph.emit("cache_attention", heads.query(q), store, seen, *rest, before=attention)
        graph.replace(attention, heads.output(attended))
        graph.fx.erase_node(attention)


_AFTER_VALUES = (
    "positions", "lengths", "counts", "tree", "scale", "window", "softcap", "sinks",
)  # fmt: skip


# --- legality ------------------------------------------------------------------------------------


def _read_as_is(node: Node) -> bool:
    """A store, or a view of its features: what this pass itself leaves behind."""
    while op_name(node) == "aten.slice.Tensor":
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


def _appends(store: Node) -> list[Node]:
    return [user for user in store.users if op_name(user) == "cache_append" and user.args[0] is store]


def _stores(found: Expansion) -> list[Node]:
    return [found.latent] if found.shared is None else [found.latent, found.shared]


def _used_elsewhere(found: Expansion, attention: Node) -> str | None:
    """Only this attention may read the stores and their expansion."""
    inside = {*found.nodes, attention}
    for store in _stores(found):
        appends = _appends(store)
        if len(appends) != 1:
            return f"{store.meta['name']} is written {len(appends)} times in a step"
        inside.add(appends[0])
    for node in (*_stores(found), *found.nodes):
        readers = [user for user in node.users if user not in inside and op_name(user) != "aten.sym_size.int"]
        if readers:
            return f"{node.meta.get('name', node.name)} is also read by {readers[0].name}"
    return None


def _bias_obstacle(found: Expansion, attention: Node) -> str | None:
    """A bias on keys shifts all scores of a query alike, one on values adds once: unless sinks take part."""
    key_bias, value_bias = (argument(s.origin, "bias") is not None for s in (found.keys, found.values))
    sinks = argument(attention, "sinks") is not None
    if sinks and (key_bias or value_bias):
        return "the projection has a bias, which attention sinks do not let cancel"
    if key_bias and argument(attention, "softcap"):
        return "the keys' projection has a bias, which the soft cap does not let cancel"
    return None


# --- price ---------------------------------------------------------------------------------------


def _width(store: Node) -> int:
    return int(value(store).shape[3])


def _costs(site: Site) -> tuple[Cost, Cost]:
    """One decode step's expansion and attention, before and after; alike layers are priced once."""
    found: Expansion = site.info["expansion"]
    attention = site.nodes[0]
    window = argument(attention, "window")
    key = (_width(found.latent), found.groups, found.keys.width, found.values.width, window, len(found.nodes))
    prices = site.info["prices"]
    if key not in prices:
        prices[key] = (_expanding(site, found, attention, window), _absorbed(found, attention, window))
    costs: tuple[Cost, Cost] = prices[key]
    return costs


def _expanding(site: Site, found: Expansion, attention: Node, window: int) -> Cost:
    held = sympy.Min(C, window) if window else C
    expand = subgraph_cost(site.info["graph"], found.nodes).substitute({C: held})
    direct = found.direct.width if found.direct else 0
    wide = found.groups * (found.keys.width + direct + found.values.width)
    heads, size = _heads_and_itemsize(attention)
    attend = 2 * B * heads * (found.keys.width + direct + found.values.width) * held
    read: dict[str, Expr] = {ACTIVATIONS: B * held * wide * size, CACHE: B * held * direct * size}
    return expand + Cost({_dtype(attention): attend}, read, launches=1)


def _absorbed(found: Expansion, attention: Node, window: int) -> Cost:
    held = sympy.Min(C, window) if window else C
    rank, direct = _width(found.latent), found.direct.width if found.direct else 0
    heads, size = _heads_and_itemsize(attention)
    maps = heads * rank * (found.keys.width + found.values.width)
    flops = 2 * B * (heads * (2 * rank + direct) * held + maps)
    weights = found.groups * rank * (found.keys.width + found.values.width) * size
    read: dict[str, Expr] = {CACHE: B * held * (rank + direct) * size, WEIGHTS: sympy.Integer(weights)}
    return Cost({_dtype(attention): flops}, read, launches=3)


def _heads_and_itemsize(attention: Node) -> tuple[int, int]:
    q = value(argument(attention, "q"))
    return int(q.shape[1]), q.element_size()


def _dtype(attention: Node) -> str:
    return str(value(argument(attention, "q")).dtype).removeprefix("torch.")


# --- rewriting -----------------------------------------------------------------------------------


def _merge_stores(graph: Graph, name: str, found: Expansion) -> Node:
    """One store of the latent and the shared part, so that nothing is joined over slots."""
    old = _stores(found)
    appends = [_appends(store)[0] for store in old]
    last = next(n for n in reversed(list(graph.nodes)) if n in appends)  # both parts exist there
    new = [append.args[1] for append in appends]
    lengths, counts = appends[0].args[2:4]
    latent = found.latent
    store = add_store(graph, f"{name}.latent", 1, sum(map(_width, old)), value(latent), latent.meta["window"])
    rows = new[0] if len(new) == 1 else graph.emit(aten.cat.default, new, 3, before=last)
    graph.emit("cache_append", store, rows, lengths, counts, before=last)
    for append in appends:
        graph.fx.erase_node(append)
    for reader in [user for part in old for user in part.users if op_name(user) == "aten.sym_size.int"]:
        reader.args = (store, *reader.args[1:])  # other layers may take the number of slots from here
    return store


class _Heads:
    """Emits one layer's projections by head.

    A head is an expert that every token chooses, which makes a projection by head a ``routed_linear``.
    """

    def __init__(self, graph: Graph, found: Expansion, heads: int, before: Node) -> None:
        self.graph, self.found, self.heads, self.before = graph, found, heads, before
        ids = graph.placeholder("input_ids")
        self._sizes = [self._emit(aten.sym_size.int, ids, dim) for dim in (0, 1)]
        self._index: Node | None = None

    def query(self, q: Node) -> Node:
        """``[B, H, T, r + dr]`` from ``q [B, H, T, D]``."""
        keys, direct = self.found.keys, self.found.direct
        by_token = self._emit(aten.transpose.int, self._features(q, keys), 1, 2)
        weight = self._by_head(argument(keys.origin, "weight"), keys)
        query = self._emit(aten.transpose.int, self._project(by_token, weight, None, True), 1, 2)
        if direct is None:
            return query
        return self._emit(aten.cat.default, [query, self._features(q, direct)], 3)

    def output(self, attended: Node) -> Node:
        """``[B, T, H, E]`` from ``attended [B, T, H, r]``."""
        values = self.found.values
        weight, bias = (argument(values.origin, name) for name in ("weight", "bias"))
        return self._project(
            attended, self._by_head(weight, values), bias and self._by_head(bias, values), False
        )

    def _features(self, q: Node, segment: Segment) -> Node:
        """The features of q that meet a segment of the keys; a part of ``q = cat(...)`` where it is one."""
        if op_name(q) == "aten.cat.default" and argument(q, "dim") in (3, -1):
            at = 0
            for part in argument(q, "tensors"):
                width = int(value(part).shape[3])
                if (at, at + width) == (segment.start, segment.stop):
                    return part
                at += width
        if segment.width == value(q).shape[3]:
            return q
        return self._emit(aten.slice.Tensor, q, 3, segment.start, segment.stop)

    def _by_head(self, matrix: Node, segment: Segment) -> Node:
        """A segment's rows of a weight or bias, ``[H, width, ...]``; lowering folds it."""
        groups, width, first = self.found.groups, segment.width, segment.first
        total = int(value(matrix).shape[0])
        stride = first[1] - first[0] if groups > 1 else total
        offset = first[0] % stride if stride > 0 else 0
        start = first[0] - offset
        regular = stride > 0 and all(row == first[0] + g * stride for g, row in enumerate(first))
        if regular and offset + width <= stride and start + groups * stride <= total:
            rows = self._emit(aten.slice.Tensor, matrix, 0, start, start + groups * stride)
            rows = self._emit(aten.view.default, rows, [groups, stride, *value(matrix).shape[1:]])
            rows = self._emit(aten.slice.Tensor, rows, 1, offset, offset + width)
        else:
            parts = [self._emit(aten.slice.Tensor, matrix, 0, row, row + width) for row in first]
            rows = self._emit(aten.stack.default, parts, 0)
        if self.heads == groups:
            return rows
        return self._emit(aten.repeat_interleave.self_int, rows, self.heads // groups, 0)

    def _project(self, x: Node, weight: Node, bias: Node | None, transposed: bool) -> Node:
        """``x [B, T, H, K]`` through one matrix a head, ``[B, T, H, N]``."""
        flat = self._emit(aten.reshape.default, x, [-1, self.heads, int(value(x).shape[3])])
        if self._index is None:
            numbers = self._emit(aten.arange.default, self.heads, dtype=torch.int64, device=value(x).device)
            rows = self._emit(aten.sym_size.int, flat, 0)
            self._index = self._emit(aten.expand.default, numbers, [rows, self.heads])
        mapped = self._emit("routed_linear", flat, self._index, weight, bias, transposed)
        return self._emit(aten.view.default, mapped, [*self._sizes, self.heads, -1])

    def _emit(self, target: Any, *args: Any, **options: Any) -> Node:
        return self.graph.emit(target, *args, before=self.before, **options)
