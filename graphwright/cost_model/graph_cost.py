"""The cost of a whole graph, op by op."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from graphwright.cost_model import depth_costs as _depth_costs  # noqa: F401  registers its rules
from graphwright.cost_model import prefill_costs as _prefill_costs  # noqa: F401  registers its rule
from graphwright.cost_model import prefix_costs as _prefix_costs  # noqa: F401  registers its rule
from graphwright.cost_model import sparse_costs as _sparse_costs  # noqa: F401  registers its rules
from graphwright.cost_model.cost import ACTIVATIONS, C, Cost, Expr, T
from graphwright.cost_model.op_costs import EAGER_KERNELS, FUSIBLE, RULES, elementwise
from graphwright.cost_model.packed_costs import by_tile
from graphwright.cost_model.shapes import Call, Shapes, is_free, source, tensors
from graphwright.ir.errors import InputError
from graphwright.ir.graph import Graph, argument, op_name

HEAD, EMBEDDING, ELEMENTWISE, LINEAR, MATMUL = "lm_head", "embedding", "elementwise", "linear", "matmul"
PACKED_ATTENTION = "packed_attention"
# Sorting and scattering are kernels of their own in every compiler.
_OWN_KERNEL = ("topk", "sort", "scatter", "index_put", "index_copy", "cumsum", "histc", "multinomial")
_LINEARS = ("aten.linear.default", "aten.addmm.default", "aten.mm.default")


@dataclass(frozen=True)
class GraphCost:
    """What a graph takes, by node and by op.

    ``by_op`` groups by semantic op; other ops count as ``embedding``, ``linear`` (against a parameter),
    ``matmul`` or ``elementwise``, and the last projection to the vocabulary as ``lm_head``.
    """

    by_node: Mapping[Node, Cost]
    groups: Mapping[Node, str]

    @cached_property
    def by_op(self) -> dict[str, Cost]:
        """The cost of each group of ops, largest groups as they first appear."""
        members: dict[str, list[Cost]] = {}
        for node, cost in self.by_node.items():
            members.setdefault(self.groups[node], []).append(cost)
        return {group: Cost.sum(costs) for group, costs in members.items()}

    @cached_property
    def total(self) -> Cost:
        """The cost of one step with T tokens per sequence over C tokens in the cache."""
        return Cost.sum(self.by_op.values())

    def phase(self, phase: str) -> dict[str, Cost]:
        """``by_op`` for one phase.

        Args:
            phase: ``decode`` (T = 1), ``verify`` (T tokens, logits for each of them) or ``prefill``
                (T tokens, logits for the last one only).

        Raises:
            InputError: no such phase.
        """
        if phase == "decode":
            return {group: cost.substitute({T: 1}) for group, cost in self.by_op.items()}
        if phase == "verify":
            return dict(self.by_op)
        if phase == "prefill":
            return {g: c.substitute({T: 1}) if g == HEAD else c for g, c in self.by_op.items()}
        raise InputError(
            f"there is no phase {phase!r}", where="cost(phase)", hint="decode, verify or prefill"
        )

    def cost(self, phase: str = "decode") -> Cost:
        """The summed cost of one phase, as an expression; see :meth:`phase`."""
        return Cost.sum(self.phase(phase).values())

    def __str__(self) -> str:
        lines = []
        for group, cost in self.by_op.items():
            lines += [f"{group}:", *(f"  {line}" for line in str(cost).splitlines())]
        return "\n".join(lines)


def graph_cost(graph: Graph, *, fused: bool | None = None, only: Collection[Node] | None = None) -> GraphCost:
    """Price every node of a graph, captured, canonical or rewritten.

    Sizes must be known from ``meta["val"]``. Ops that a compiler fuses (elementwise ops, norms, rotary)
    start one kernel per connected region, and only what enters or leaves the region is traffic; where nothing
    is fused, each step of each op starts one. Linears of one input, and an attention with its appends, are
    one launch (lowering joins them). What reads packed stores runs a tile at a time.

    Args:
        graph: what to price.
        fused: whether it is compiled; by default unless it says otherwise (``annotations["compile"]``).
        only: the nodes that are asked for; all of them by default.
    """
    shapes = Shapes(graph)
    head = find_head(graph)
    regions = _Regions(graph, fused=graph.annotations.get("compile", True) if fused is None else fused)
    joined = _joined(graph) | shapes.streaming.joined
    memo: dict[Any, Cost] = {}
    by_node: dict[Node, Cost] = {}
    groups: dict[Node, str] = {}
    for node in graph.nodes:
        if is_free(node):
            continue
        traffic = regions.traffic(node, shapes)
        if only is not None and node not in only:
            continue
        cost = _node_cost(node, shapes, memo) + traffic
        if (runs := shapes.streaming.runs.get(node)) and op_name(node) != "cache_read":
            eager = EAGER_KERNELS.get(op_name(node) or "", 1) if _is_fusible(node) else cost.launches
            cost = by_tile(cost, runs, eager)
        by_node[node] = cost - Cost(launches=1) if node in joined else cost
        kernel = PACKED_ATTENTION if node in shapes.streaming.in_kernel else _group(node)
        groups[node] = HEAD if node is head else kernel
    return GraphCost(by_node, groups)


def subgraph_cost(graph: Graph, nodes: Iterable[Node], tokens: Any = C) -> Cost:
    """The price of recomputing some nodes over other tokens than the step's own.

    A placement that stores less than K and V evaluates part of a layer again for every cached token:
    its arithmetic grows with the context, its weights are read once all the same.

    Args:
        graph: the graph that holds the nodes.
        nodes: what is evaluated again; attention among them is refused, it has a cache of its own.
        tokens: tokens per sequence it is evaluated over, the context C by default.

    Raises:
        InputError: an attention op is among the nodes.
    """
    wanted = set(nodes)
    cache_ops = [n for n in wanted if "attention" in (op_name(n) or "") or op_name(n) == "cache_append"]
    if cache_ops:
        raise InputError(
            f"{cache_ops[0].name} works on the cache and cannot be recomputed over it",
            where="subgraph_cost(nodes=...)",
            hint="pass the nodes between the stored tensor and the attention's inputs",
        )
    shapes, regions = Shapes(graph), _Regions(graph, wanted)
    costs = [_node_cost(n, shapes, {}) + regions.traffic(n, shapes) for n in wanted if not is_free(n)]
    return Cost.sum(costs).substitute({T: tokens})


def _joined(graph: Graph) -> set[Node]:
    """Kernels that lowering joins with one that is counted."""
    readers: dict[Node, Node] = {}
    joined = {n for n in graph.calls("linear") if readers.setdefault(argument(n, "x"), n) is not n}
    appends: dict[Node, list[Node]] = {}
    for node in graph.calls("cache_append"):
        appends.setdefault(argument(node, "store"), []).append(node)
    for node in graph.calls("cache_attention"):
        stores = [argument(node, "keys"), argument(node, "values")]
        written = [appends.get(store, []) for store in stores]
        if stores[0] is not stores[1] and all(len(found) == 1 for found in written):
            joined.update(found[0] for found in written)
    return joined


def find_head(graph: Graph) -> Node | None:
    """The projection to the vocabulary: the last matrix product before the logits."""
    arguments = graph.output.all_input_nodes
    node = arguments[0] if len(arguments) >= 1 else None
    while node is not None and node.op == "call_function":
        if _group(node) == LINEAR and not is_free(node):
            return node
        inputs = [n for n in node.all_input_nodes if n.op == "call_function" and tensors(n)]
        if not (is_free(node) or _is_fusible(node)) or len({source(n) for n in inputs}) != 1:
            return None
        node = inputs[0]
    return None


def _node_cost(node: Node, shapes: Shapes, memo: dict[Any, Cost]) -> Cost:
    """One node's rule, run once for all nodes of equal op, shapes, dtypes, options and state."""
    streaming = shapes.streaming
    runs = (node in streaming.in_kernel, node in streaming.attentions, streaming.listings.get(node))
    key = (_signature(node), *runs)
    if key not in memo:
        memo[key] = RULES.get(op_name(node) or "", elementwise)(Call(node, shapes))
        if not _is_fusible(node) and op_name(node) not in RULES:
            memo[key] = memo[key] + Cost(read=_activations(node, shapes), launches=1)
    return memo[key]


def _signature(node: Node) -> Any:
    def describe(value: Any) -> Any:
        if isinstance(value, Node):
            held = source(value).meta
            packing = held.get("store", {})
            about = (
                held.get("kind"),
                held.get("window"),
                *(packing.get(k) for k in ("recent", "codec", "page", "tokens", "keep", "slack")),
            )
            return (*about, tuple((str(t.shape), t.dtype) for t in tensors(value)))
        if isinstance(value, (list, tuple)):
            return tuple(describe(item) for item in value)
        return str(value)

    outputs = tuple((str(t.shape), t.dtype) for t in tensors(node))
    kwargs = tuple((name, describe(value)) for name, value in node.kwargs.items())
    return (op_name(node), describe(node.args), kwargs, outputs)


def _activations(node: Node, shapes: Shapes) -> dict[str, Expr]:
    """Bytes of activations that a node of its own kernel reads and writes."""
    inputs = [n for n in node.all_input_nodes if "kind" not in source(n).meta]
    sizes = [shapes.nbytes(t) for n in (*inputs, node) for t in tensors(n)]
    return {ACTIVATIONS: sympy.Add(*sizes)}


def _is_fusible(node: Node) -> bool:
    name = op_name(node) or ""
    if name in RULES:
        return name in FUSIBLE
    return not is_free(node) and not any(part in name for part in _OWN_KERNEL)


def _group(node: Node) -> str:
    name = op_name(node) or ""
    if name in _LINEARS:
        weight = [n for n in node.all_input_nodes if source(n).meta.get("kind") == "parameter"]
        return LINEAR if weight else MATMUL
    if name == "aten.embedding.default":
        return EMBEDDING
    if name.startswith("aten.") and "mm" in name.split(".")[1]:
        return MATMUL
    if "." not in name or name in ("aten.layer_norm.default",):
        return name.removeprefix("aten.").removesuffix(".default")
    return ELEMENTWISE


class _Regions:
    """Which fusible nodes share a kernel.

    Two neighbours share one if no kernel of another op lies between them on any path: the longest chain
    of such kernels above both is equally long.
    """

    def __init__(self, graph: Graph, only: set[Node] | None = None, *, fused: bool = True) -> None:
        self._only, self._fused = only, fused
        self._parent: dict[Node, Node] = {}
        self._started: set[Node] = set()
        self._read: set[tuple[Node, Node]] = set()
        level: dict[Node, int] = {}
        for node in graph.nodes:
            inputs = [source(n) for n in node.all_input_nodes]
            level[node] = max((level[n] + self._is_kernel(n) for n in inputs), default=0)
            if not _is_fusible(node) or not self._inside(node):
                continue
            self._parent[node] = node
            for before in inputs:
                if before in self._parent and level[before] == level[node]:
                    self._parent[self._find(before)] = self._find(node)

    def _inside(self, node: Node) -> bool:
        return self._only is None or node in self._only

    @staticmethod
    def _is_kernel(node: Node) -> bool:
        return not is_free(node) and not _is_fusible(node)

    def _find(self, node: Node) -> Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def traffic(self, node: Node, shapes: Shapes) -> Cost:
        """Launch and activation bytes of a fused node; call once for each node of the graph."""
        if node not in self._parent:
            return Cost()
        region = self._find(node)
        launches = 0 if region in self._started else 1
        if not self._fused:
            launches = EAGER_KERNELS.get(op_name(node) or "", 1)
        self._started.add(region)
        read = [shapes.nbytes(t) for n in node.all_input_nodes for t in self._entering(source(n), region)]
        leaves = any(self._region(user) is not region for user in _computing_users(node))
        written = [shapes.nbytes(t) for t in tensors(node)] if leaves else []
        return Cost(
            read={ACTIVATIONS: sympy.Add(*read)},
            written={ACTIVATIONS: sympy.Add(*written)},
            launches=launches,
        )

    def _entering(self, producer: Node, region: Node) -> list[torch.Tensor]:
        """What a region reads of a value computed outside of it: all of it, once."""
        if self._region(producer) is region or "kind" in producer.meta or (producer, region) in self._read:
            return []
        self._read.add((producer, region))
        return tensors(producer)

    def _region(self, node: Node) -> Node | None:
        return self._find(node) if node in self._parent else None


def _computing_users(node: Node) -> list[Node]:
    """The nodes that compute something from a value, directly or through views of it."""
    found: list[Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "call_function" and is_free(user):
            stack.extend(user.users)
        else:
            found.append(user)
    return found
