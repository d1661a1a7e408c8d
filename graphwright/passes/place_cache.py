"""``place_cache``: give every attention a cache, stored where it is cheapest.

Before, each attention sees only the tokens of its own call. After, the step appends what it computed
to preallocated storage and attends over everything stored. What is stored is a cut of the layer (see
:mod:`graphwright.passes.cache_cut`): keys and values, or fewer elements from which they are computed
again. Layers with a sliding window keep the window and a slack for the step, as a ring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch.fx.node import Node

from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.dominators import token_dominators
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, argument, module_path, op_name, value
from graphwright.passes.base import CostDelta, Fidelity, Pass, Site, Verdict, register_pass
from graphwright.passes.cache_cut import Cut, LayerSlice, token_dim
from graphwright.passes.cache_price import CachePrice, price_cut

_VIEWS = ("aten.view.default", "aten.transpose.int", "aten.unsqueeze.default", "aten.slice.Tensor")
CUTS = ("auto", "kv", "minimum", "pre_rotary")


@register_pass
@dataclass(frozen=True)
class PlaceCache(Pass):
    """Decide what each layer stores between steps.

    Options:
        cut: ``kv`` stores keys and values; ``minimum`` stores the minimum cut and recomputes the
            rest; ``pre_rotary`` stores keys before their positions are applied, which only pays when
            they are quantized; ``auto`` lets the cost model choose between the first two for the
            workload and the memory limit.
    """

    name: ClassVar[str] = "place_cache"
    summary: ClassVar[str] = "store what each layer needs of past tokens: keys and values, or a cheaper cut"
    fidelity: ClassVar[Fidelity] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"cache"})
    follows: ClassVar[frozenset[str]] = frozenset({"skip_layers", "slide_attention"})

    cut: str = "auto"

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise PassError(f"place_cache has no cut {self.cut!r}", hint=f"choose one of {', '.join(CUTS)}")

    @classmethod
    def variants(cls) -> list[Pass]:
        return [cls(cut="kv"), cls(cut="minimum")]

    def find(self, graph: Graph) -> list[Site]:
        dominators, order = token_dominators(graph)
        shared: dict[int, SlotClones] = {}
        prices: dict[Any, Any] = {}
        sites = []
        for index, attention in enumerate(graph.calls("attention")):
            layer = LayerSlice(graph, attention, dominators, order)
            info = {
                "layer": layer,
                "graph": graph,
                "keys_and_values": layer.keys_and_values(),
                "minimum": layer.minimum(),
                "pre_rotary": layer.pre_rotary() if self.cut == "pre_rotary" else None,
                "window": argument(attention, "window"),
                "shared": shared,
                "prices": prices,
            }
            sites.append(Site(module_path(attention) or f"attention.{index}", (attention,), info))
        return sites

    def legal(self, site: Site) -> Verdict:
        if self.cut == "pre_rotary" and site.info["pre_rotary"] is None:
            return Verdict(False, "its keys are not rotated")
        cut = self._cut(site)
        if any(token_dim(site.info["graph"], n) is None for n in cut.stored):
            return Verdict(False, "keys and values are not laid out as [batch, heads, tokens, features]")
        return Verdict(True, describe(site, cut))

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        price = price_cut(site, self._cut(site), workload, target)
        note = _compare(site, price, workload, target)
        # Without a cache every token costs a pass over the whole context: any cut wins over none.
        return CostDelta(-price.recompute_everything, price.memory_bytes, note)

    def resolve(self, graph: Graph, workload: Workload, target: Target, memory: float | None) -> Pass:
        """Keys and values unless they do not fit the memory limit, or the minimum cut is faster."""
        if self.cut != "auto":
            return self
        totals = {}
        for cut in ("kv", "minimum"):
            option = replace(self, cut=cut)
            prices = [price_cut(s, option._cut(s), workload, target) for s in option.find(graph)]
            totals[cut] = (sum(p.seconds_per_token for p in prices), sum(p.memory_bytes for p in prices))
        kv, minimum = totals["kv"], totals["minimum"]
        too_large = memory is not None and kv[1] > memory and minimum[1] < kv[1]
        return replace(self, cut="minimum" if too_large or minimum[0] < kv[0] else "kv")

    def apply(self, site: Site, graph: Graph) -> None:
        attention = site.nodes[0]
        inputs = step_inputs(graph)
        cut = self._cut(site)
        stores = {n: self._store(graph, site, n, attention) for n in cut.stored}
        if cut.is_keys_and_values:
            layer: LayerSlice = site.info["layer"]
            keys, values = stores[layer.keys], stores[layer.values]
        else:
            keys, values = recompute_from_stores(graph, site, cut, stores, attention)
        names = ("scale", "window", "softcap", "sinks")
        scale, window, softcap, sinks = (argument(attention, name) for name in names)
        cached = graph.emit(
            "cache_attention",
            argument(attention, "q"), keys, values,
            inputs["positions"], inputs["lengths"], inputs["counts"], inputs["tree"],
            scale, window, softcap, sinks,
            before=attention,
        )  # fmt: skip
        graph.replace(attention, cached)
        graph.fx.erase_node(attention)

    def _cut(self, site: Site) -> Cut:
        # An unresolved auto stores keys and values: what every runtime does.
        return cast(Cut, site.info[self.cut if self.cut in ("minimum", "pre_rotary") else "keys_and_values"])

    def _store(self, graph: Graph, site: Site, node: Node, attention: Node) -> Node:
        layer: LayerSlice = site.info["layer"]
        role = {layer.keys: "keys", layer.values: "values"}.get(node, node.name)
        if layer.keys is layer.values:
            role = "keys"
        elif self.cut == "pre_rotary" and [n for n in self._cut(site).stored if n is not layer.values] == [
            node
        ]:
            role = "pre_rotary_keys"
        inputs = step_inputs(graph)
        rows = as_heads(graph, node, attention)
        groups, features = value(rows).shape[1], value(rows).shape[3]
        store = add_store(graph, f"{site.name}.{role}", groups, features, value(rows), site.info["window"])
        graph.emit("cache_append", store, rows, inputs["lengths"], inputs["counts"], before=attention)
        return store


def describe(site: Site, cut: Cut) -> str:
    """What a cut stores, in words."""
    window = site.info["window"]
    kept = f", the last {window} tokens" if window else ""
    if cut.is_keys_and_values:
        return f"stores keys and values, {cut.elements} elements a token{kept}"
    names = " and ".join(_origin(n) for n in cut.stored)
    again = f"recomputes keys and values ({len(cut.recomputed)} ops)"
    return f"stores {names}, {cut.elements} elements a token{kept}, and {again}"


def _origin(node: Node) -> str:
    """What a stored tensor is: ``the output of input_layernorm``, or of an op of its module."""
    while op_name(node) in _VIEWS:
        node = node.all_input_nodes[0]
    module = module_path(node).split(".")[-1]
    if op_name(node) in ("rms_norm", "layer_norm", "linear"):
        return f"the output of {module}"
    return f"{(op_name(node) or node.name).removeprefix('aten.').split('.')[0]} in {module}"


def _compare(site: Site, price: CachePrice, workload: Workload, target: Target) -> str:
    """The alternative cut with its price, for the report."""
    minimum, direct = site.info["minimum"], site.info["keys_and_values"]
    if minimum.elements >= direct.elements:
        return "the minimum cut is keys and values themselves"
    other = price_cut(site, minimum, workload, target)
    base = price_cut(site, direct, workload, target)
    return (
        f"keys and values: {direct.elements} elements a token, {base.seconds_per_token * 1e6:.1f} us a step; "
        f"minimum cut: {minimum.elements}, {other.seconds_per_token * 1e6:.1f} us a step with recomputation"
    )


# --- storage in the graph ------------------------------------------------------------------------


def step_inputs(graph: Graph) -> dict[str, Node]:
    """The inputs that a step with state has, added when missing (shapes in ``cache_attention``)."""
    found = {n.meta["name"]: n for n in graph.placeholders("input")}
    positions = value(found["positions"])
    with graph.fake_mode:
        fresh = {
            "lengths": positions.new_empty((positions.shape[0],)),
            "counts": positions.new_empty((positions.shape[0],)),
            "tree": positions.new_empty((positions.shape[0], 0)),
        }
    last = found["positions"]
    for name, fake in fresh.items():
        if name not in found:
            if name == "tree":
                fake = _tree_like(graph, positions)
            with graph.fx.inserting_after(last):
                found[name] = graph.fx.placeholder(name)
            found[name].meta.update(kind="input", name=name, val=fake)
        last = found[name]
    return found


def dense_input(graph: Graph) -> Node:
    """The input ``dense [B]``: how many tokens of the step read everything; see ``ir/sparse_ops.py``."""
    inputs = step_inputs(graph)
    for node in graph.placeholders("input"):
        if node.meta["name"] == "dense":
            return node
    with graph.fx.inserting_after(inputs["tree"]):
        dense = graph.fx.placeholder("dense")
    with graph.fake_mode:
        fake = torch.empty_like(value(inputs["counts"]))
    dense.meta.update(kind="input", name="dense", val=fake)
    return dense


def _tree_like(graph: Graph, positions: torch.Tensor) -> torch.Tensor:
    """``[B, N]`` with N of its own: 0 for a chain, T for a tree."""
    width = new_size(graph, 3)
    with graph.fake_mode:
        return positions.new_empty((positions.shape[0], width))


def new_size(graph: Graph, hint: int) -> Any:
    """A fresh symbolic size."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return graph.fake_mode.from_tensor(torch.empty(hint), symbolic_context=context).shape[0]


def store_slots(graph: Graph, window: int) -> Any:
    """The symbol for the slots of stores with this window."""
    plain = [n for n in graph.placeholders("state") if n.meta["window"] == window and "store" not in n.meta]
    slots = next((value(n).shape[2] for n in plain), None)
    return new_size(graph, 37 + window) if slots is None else slots


def add_store(graph: Graph, name: str, groups: int, features: int, like: torch.Tensor, window: int) -> Node:
    """A state placeholder ``[B, G, S, D]``; stores with the same window share the symbol S."""
    slots = store_slots(graph, window)
    with graph.fake_mode:
        fake = torch.empty((like.shape[0], groups, slots, features), dtype=like.dtype, device=like.device)
    store = graph.add_placeholder("state", name, fake)
    store.meta["window"] = window
    return store


def as_heads(graph: Graph, node: Node, before: Node) -> Node:
    """``[B, T, D]`` or ``[B, T, G, D]`` or ``[B, G, T, D]`` as ``[B, G, T, D]``."""
    dim = token_dim(graph, node)
    if value(node).dim() == 3:
        if dim == 2:
            node = graph.emit(torch.ops.aten.transpose.int, node, 1, 2, before=before)
        return graph.emit(torch.ops.aten.unsqueeze.default, node, 1, before=before)
    return node if dim == 2 else graph.emit(torch.ops.aten.transpose.int, node, 1, 2, before=before)


def _like_original(graph: Graph, original: Node, store: Node, before: Node) -> Node:
    """A store ``[B, G, S, D]`` laid out as the node it holds, with S in the place of T."""
    dim = token_dim(graph, original)
    if value(original).dim() == 3:
        flat = graph.emit(torch.ops.aten.select.int, store, 1, 0, before=before)
        return flat if dim == 1 else graph.emit(torch.ops.aten.transpose.int, flat, 1, 2, before=before)
    return store if dim == 2 else graph.emit(torch.ops.aten.transpose.int, store, 1, 2, before=before)


@dataclass
class SlotClones:
    """What layers of one window share when they recompute: the number of slots and positional nodes."""

    slots: Node
    positions: Node
    clones: dict[Node, Node]


def _slot_clones(graph: Graph, site: Site, store: Node, before: Node) -> SlotClones:
    """Made where the first layer needs it; later layers reuse it."""
    shared: dict[int, SlotClones] = site.info["shared"]
    window = site.info["window"]
    if window not in shared:
        inputs = step_inputs(graph)
        slots = graph.emit(torch.ops.aten.sym_size.int, store, 2, before=before)
        positions = graph.emit("slot_positions", inputs["lengths"], inputs["counts"], slots, before=before)
        clones = {inputs["positions"]: positions}
        tokens = _tokens_node(graph)
        if tokens is not None:
            clones[tokens] = slots
        shared[window] = SlotClones(slots, positions, clones)
    return shared[window]


def recompute_from_stores(
    graph: Graph, site: Site, cut: Cut, stores: dict[Node, Node], before: Node
) -> tuple[Node, Node]:
    """Keys and values of every slot, computed from what is stored; rotary uses each slot's position."""
    layer: LayerSlice = site.info["layer"]
    shared = _slot_clones(graph, site, next(iter(stores.values())), before)
    mapping = dict(shared.clones)
    for node, store in stores.items():
        mapping[node] = _like_original(graph, node, store, before)
    keys, values = (_clone(graph, node, mapping, before) for node in (layer.keys, layer.values))
    own = {*layer.nodes, *stores}
    shared.clones.update({old: new for old, new in mapping.items() if old not in own})
    return keys, values


def _tokens_node(graph: Graph) -> Node | None:
    ids = graph.placeholder("input_ids")
    for node in graph.calls("aten.sym_size.int"):
        if node.args == (ids, 1):
            return node
    return None


def _clone(graph: Graph, root: Node, mapping: dict[Node, Node], before: Node) -> Node:
    """``root`` with the mapped nodes replaced; nodes that depend on none of them are shared."""
    stack = [root]
    while stack:
        node = stack[-1]
        if node in mapping:
            stack.pop()
            continue
        waiting = [n for n in node.all_input_nodes if n not in mapping]
        if waiting:
            stack.extend(waiting)
            continue
        stack.pop()
        if all(mapping[n] is n for n in node.all_input_nodes):
            mapping[node] = node
            continue
        with graph.fx.inserting_before(before):
            clone = graph.fx.node_copy(node, mapping.__getitem__)
        clone.meta = dict(node.meta)
        clone.meta["val"] = graph.infer(clone)
        mapping[node] = clone
    return mapping[root]
