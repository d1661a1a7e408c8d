"""Where to cut a layer so that what lies behind the cut can be recomputed from what is stored.

A layer's keys and values are functions of the residual stream and of the positions. Any set of
tensors that separates the two can be stored instead of keys and values; the cheapest such set in
elements per token is a minimum cut (networkx). Positions cost nothing: cosines, sines and masks
are recomputed. Grouped heads give keys and values, full multi-head attention gives the layer input
(the idea of XQuant, Tomar et al. 2025), latent attention gives the compressed latent and the rotary
part (DeepSeek-V2, section 2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import networkx as nx
from torch.fx.node import Node

from graphwright.ir.graph import Graph, ancestors, argument, is_tensor, op_name, value

# Ops that treat every token by itself, so that they may run again on stored tokens.
_TOKEN_WISE_OPS = {"linear", "linear_group", "rms_norm", "layer_norm", "rotary", "gated_mlp", "mlp"}
_TOKEN_WISE_ATEN = {
    "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "exp", "tanh", "sigmoid", "silu", "gelu",
    "relu", "clamp", "_to_copy", "to", "type_as", "view", "reshape", "_unsafe_view", "transpose", "permute",
    "unsqueeze", "squeeze", "expand", "slice", "select", "cat", "stack", "flatten", "unflatten", "clone",
    "contiguous", "split", "split_with_sizes", "chunk", "alias", "repeat_interleave", "sum", "mean",
    "dropout",
}  # fmt: skip
_PROJECTIONS = {"linear", "linear_group", "gated_mlp", "mlp", "routed_linear"}
_INFINITE = math.inf
# Ties go to the tensors nearest to the attention: one element outweighs any distance.
_ELEMENT = 1 << 40
# What one tensor more outweighs, where as few as possible are wanted: any distance, and no element.
_STORE = 1 << 32


@dataclass(frozen=True)
class Cut:
    """What one layer stores.

    Attributes:
        stored: nodes whose values are kept, one entry a token, in execution order.
        recomputed: nodes between the stored ones and the keys and values, in execution order.
        elements: stored elements per token
    """

    stored: tuple[Node, ...]
    recomputed: tuple[Node, ...]
    elements: int

    @property
    def is_keys_and_values(self) -> bool:
        """Whether nothing has to be recomputed."""
        return not self.recomputed


class LayerSlice:
    """The nodes between the residual stream and one attention's keys and values."""

    def __init__(self, graph: Graph, attention: Node, dominators: dict[Node, Node], order: dict[Node, int]):
        self.graph = graph
        self.order = order
        self.keys: Node = argument(attention, "k")
        self.values: Node = argument(attention, "v")
        self.source = self._residual_input(attention, dominators)
        self.nodes = self._between()

    def _residual_input(self, attention: Node, dominators: dict[Node, Node]) -> Node:
        """The nearest node that dominates keys and values and is used past this attention's inputs."""
        feeding = ancestors([argument(attention, name) for name in ("q", "k", "v")])
        node = _common_dominator(self.keys, self.values, dominators, self.order)
        while all(user in feeding for user in node.users):
            above = dominators.get(node, node)
            if above is node or above.op == "placeholder":
                break
            node = above
        return node

    def _between(self) -> list[Node]:
        """Nodes on a path from the source to keys or values; the source excluded."""
        start = self.order[self.source]
        reached: set[Node] = set()
        stack = [self.keys, self.values]
        while stack:
            node = stack.pop()
            if node in reached or self.order.get(node, -1) <= start:
                continue
            reached.add(node)
            stack.extend(node.all_input_nodes)
        tokens = {self.source}
        ordered = sorted(reached, key=self.order.__getitem__)
        for node in ordered:
            if any(n in tokens for n in node.all_input_nodes):
                tokens.add(node)
        return [n for n in ordered if n in tokens]

    def keys_and_values(self) -> Cut:
        """Store keys and values themselves."""
        stored = sorted({self.keys, self.values}, key=self.order.__getitem__)
        return Cut(tuple(stored), (), sum(self.elements(n) or 0 for n in stored))

    def minimum(self) -> Cut:
        """The minimum cut; ties go to the tensors nearest to the attention."""
        stored = self._separate(frozenset(), frozenset())
        cut, direct = self._cut(stored), self.keys_and_values()
        return cut if cut.elements < direct.elements else direct

    def pre_rotary(self) -> Cut | None:
        """Keys before their positions are applied, and values; None if keys are not rotated.

        Source: Hooper et al. 2024, KVQuant, section 3.2 (keys before RoPE are easier to quantize).
        """
        rotated = ancestors([self.keys]) & {n for n in self.nodes if op_name(n) == "rotary"}
        if not rotated:
            return None
        after = {n for n in self.nodes if any(r in ancestors([n]) for r in rotated)}
        before = {n for n in self.nodes if (op_name(n) or "") in _PROJECTIONS}
        return self._cut(self._separate(frozenset(after), frozenset(before), _STORE))

    def _separate(self, after: frozenset[Node], before: frozenset[Node], each: int = 0) -> list[Node]:
        """The minimum set of nodes to store with ``after`` recomputed from it and ``before`` not.

        ``each`` is what a tensor costs beside its elements: with it, the parts of a key that are rotated
        and those that are not stay one store, but keys and values do not become one.
        """
        network = nx.DiGraph()
        joint = ancestors([self.keys]) & ancestors([self.values])
        last = max(self.order[self.keys], self.order[self.values])
        for node in [self.source, *self.nodes]:
            if not is_tensor(node):  # a tuple of tensors: passes through, cannot be stored as such
                network.add_edge((node, "in"), (node, "out"), capacity=_INFINITE)
                continue
            size = self.elements(node)
            distance = last - self.order[node]
            free = size is not None and node not in after
            own = (size or 0) * (_ELEMENT + distance) + each * (3 if node in joint else 1)
            capacity = own if free else _INFINITE
            network.add_edge((node, "in"), (node, "out"), capacity=capacity)
        inside = {self.source, *self.nodes}
        for node in self.nodes:
            # What cannot run again on stored tokens must lie before the cut.
            for previous in node.all_input_nodes:
                if previous in inside:
                    network.add_edge((previous, "out"), (node, "in"), capacity=_INFINITE)
                    if node in before or not is_token_wise(node):
                        network.add_edge("source", (node, "in"), capacity=_INFINITE)
        network.add_edge("source", (self.source, "in"), capacity=_INFINITE)
        for end in {self.keys, self.values}:
            network.add_edge((end, "out"), "sink", capacity=_INFINITE)
        _, (near, _far) = nx.minimum_cut(network, "source", "sink")
        return [n for n in [self.source, *self.nodes] if (n, "in") in near and (n, "out") not in near]

    def _cut(self, stored: list[Node]) -> Cut:
        kept = set(stored)
        needed: set[Node] = set()
        stack = [n for n in (self.keys, self.values) if n not in kept]
        inside = set(self.nodes)
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            stack.extend(n for n in node.all_input_nodes if n in inside and n not in kept)
        recomputed = sorted(needed, key=self.order.__getitem__)
        return Cut(tuple(stored), tuple(recomputed), sum(self.elements(n) or 0 for n in stored))

    def elements(self, node: Node) -> int | None:
        """Elements per token of a ``[B, ..., T, ...]`` tensor; None if it is not laid out by token."""
        dim = token_dim(self.graph, node)
        if dim is None:
            return None
        shape = value(node).shape
        return math.prod(int(s) for i, s in enumerate(shape) if i not in (0, dim))


def is_token_wise(node: Node) -> bool:
    """Whether a call treats every token by itself."""
    name = op_name(node)
    if name is None:
        return False
    if name in _TOKEN_WISE_OPS or name == "getitem":
        return True
    return name.startswith("aten.") and name.split(".")[1] in _TOKEN_WISE_ATEN


def token_dim(graph: Graph, node: Node) -> int | None:
    """The dimension that counts the step's tokens, if dimension 0 counts rows; otherwise None."""
    if not is_tensor(node):
        return None
    batch, tokens = value(graph.placeholder("input_ids")).shape
    shape = value(node).shape
    if not shape or str(shape[0]) != str(batch):
        return None
    found = [i for i, s in enumerate(shape) if str(s) == str(tokens)]
    if len(found) != 1 or len(shape) not in (3, 4):
        return None
    return found[0] if all(isinstance(s, int) for i, s in enumerate(shape) if i not in (0, *found)) else None


def _common_dominator(a: Node, b: Node, dominators: dict[Node, Node], order: dict[Node, int]) -> Node:
    while a is not b:
        if order[a] < order[b]:
            a, b = b, a
        a = dominators[a]
    return a
