"""Which tensors of a graph divide over devices under tensor parallelism.

The rules are those of Megatron-LM (Shoeybi et al. 2019, section 3), read off the graph:

- The projections into attention divide by heads, those into a feed-forward's hidden width by columns, and
  the projections back divide by rows. Their biases divide, those of the projections back do not.
- Key and value heads, and what the cache keeps of them, divide up to their number; beyond it devices hold
  copies. A latent (multi-head latent attention), or a layer's input kept in its place, serves every head:
  each device holds all of it, with the projection into it.
- Every expert divides by its width; routers do not divide.
- The embedding and the projection to the vocabulary divide by vocabulary. Norms, position tables and
  everything else are copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx.node import Node

from graphwright.cost_model.graph_cost import find_head
from graphwright.cost_model.shapes import is_free, source, tensors
from graphwright.ir.graph import Graph, argument, op_name

_ATTENTION = {
    "attention": ("q", "k", "v"),
    "append_attention": ("q", "k", "v"),
    "cache_attention": ("q", "keys", "values"),
    "prefix_attention": ("q", "keys", "values"),
    "prefill_attention": ("q", "keys", "values"),
}
_LINEAR = ("linear", "linear_group")
_FEED_FORWARD = {"gated_mlp": ("gate", "up"), "mlp": ("up",)}
# A projection whose result meets one of these before the next projection is not one half of a pair.
_NORMS = ("rms_norm", "layer_norm")
_REDUCTIONS = ("softmax", "topk", "sort", "sum", "mean", "cumsum", "argmax")

#: Parts of a parameter: the fraction of it, and into how many shares that part can be divided.
Parts = tuple[tuple[float, int], ...]


def share(ways: int, degree: int) -> float:
    """The fraction of something in ``ways`` parts that the fullest of ``degree`` devices holds."""
    return math.ceil(ways / degree) / ways


@dataclass(frozen=True)
class Sharding:
    """What of a graph divides over devices; what is in neither is copied.

    Args:
        parameters: by qualified name, as parts that may divide in different ways (joined projections).
        values: by node, the ways in which its results (of a feed-forward: its hidden activations) divide.
    """

    parameters: dict[str, Parts]
    values: dict[Node, int]

    def weights_bytes(self, graph: Graph, degree: int) -> int:
        """Bytes of parameters on the fullest device; tied tensors count once."""
        held: dict[int, float] = {}
        for name, tensor in graph.parameters.items():
            storage = tensor.untyped_storage()
            parts = self.parameters.get(name, ((1.0, 1),))
            fraction = sum(part * share(ways, degree) for part, ways in parts)
            held[storage._cdata] = max(held.get(storage._cdata, 0.0), storage.nbytes() * fraction)
        return math.ceil(sum(held.values()) - 1e-6)

    def shares(self, degree: int) -> dict[Node, float]:
        """The fraction of each divided value that a device holds."""
        return {node: share(ways, degree) for node, ways in self.values.items()}


def sharding(graph: Graph) -> Sharding:
    """Which parameters and values of a graph divide over devices.

    Args:
        graph: canonical or rewritten, on any device.
    """
    return _Rules(graph).run()


# --- the rules -----------------------------------------------------------------------------------


class _Rules:
    """One pass over the graph, in order: a value that is divided says so to those who read it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.head = find_head(graph)
        self.parameters: dict[str, Parts] = {}
        self.values: dict[Node, int] = {}
        self.by_heads = self._into_attention()

    def run(self) -> Sharding:
        for state in self.graph.placeholders("state"):
            self._divide(state, _state_heads(state))
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
        return Sharding(self.parameters, self.values)

    def _visit(self, node: Node) -> None:
        name = op_name(node) or ""
        if name in _ATTENTION:
            heads = int(argument(node, "q").meta["val"].shape[1])
            self._divide(node, heads)
            self._parameter(argument(node, "sinks"), ((1.0, heads),))
        elif name in _LINEAR:
            self._linear(node)
        elif name in _FEED_FORWARD:
            self._feed_forward(node, _FEED_FORWARD[name])
        elif name == "routed_linear":
            self._routed(node)
        elif name == "aten.embedding.default":
            table = argument(node, "weight")
            if source(argument(node, "indices")).meta.get("name") == "input_ids":
                self._parameter(table, ((1.0, int(table.meta["val"].shape[0])),))
        elif tensors(node):
            self._divide(node, max((self._ways(value) for value in node.all_input_nodes), default=1))

    def _linear(self, node: Node) -> None:
        grouped = op_name(node) == "linear_group"
        weights = argument(node, "weights" if grouped else "weight")
        biases = argument(node, "biases" if grouped else "bias")
        weights, biases = (weights, biases) if grouped else ([weights], [biases])
        columns = sum(int(weight.meta["val"].shape[0]) for weight in weights)
        parts: Parts = ((1.0, 1),)
        entering = self._ways(argument(node, "x"))
        if node in self.by_heads:
            parts = self.by_heads[node]
        elif entering > 1:  # back from a divided width: by rows, and the sum over devices is whole
            self._parameters(weights, ((1.0, entering),))
            return
        elif node is self.head or _feeds_linear(node):
            parts = ((1.0, columns),)
        self._parameters([*weights, *biases], parts)
        if node is not self.head:  # logits are gathered
            self._divide(node, max(ways for _, ways in parts))

    def _feed_forward(self, node: Node, inward: tuple[str, ...]) -> None:
        width = int(argument(node, "up").meta["val"].shape[0])
        names = [*inward, "down", *(f"{name}_bias" for name in inward)]
        self._parameters([argument(node, name) for name in names], ((1.0, width),))
        self._divide(node, width)

    def _routed(self, node: Node) -> None:
        weight, bias, x = (argument(node, name) for name in ("weight", "bias", "x"))
        experts, rows, columns = (int(size) for size in weight.meta["val"].shape)
        width = columns if argument(node, "transposed") else rows
        entering = self._ways(x)
        if argument(node, "index").meta["val"].shape[1] == experts:
            # Each head is an expert that every token chooses: an absorbed projection.
            self._parameters([weight, bias], ((1.0, experts),))
            self._divide(node, experts)
        elif entering > 1:
            self._parameter(weight, ((1.0, entering),))
        else:
            self._parameters([weight, bias], ((1.0, width),))
            self._divide(node, width)

    # --- bookkeeping -----------------------------------------------------------------------------

    def _ways(self, node: Node) -> int:
        """Into how many parts a value is divided; a feed-forward's result is whole."""
        node = source(node)
        return 1 if op_name(node) in _FEED_FORWARD else self.values.get(node, 1)

    def _divide(self, node: Node, ways: int) -> None:
        if ways > 1:
            self.values[node] = ways

    def _parameters(self, nodes: Sequence[Node | None], parts: Parts) -> None:
        if max(ways for _, ways in parts) > 1:
            for node in nodes:
                self._parameter(node, parts)

    def _parameter(self, node: Node | None, parts: Parts) -> None:
        """Mark the parameters behind a weight, which may be a view of one or made of several."""
        stack = [node] if node is not None else []
        while stack:
            found = stack.pop()
            if found.meta.get("kind") == "parameter":
                self.parameters[found.meta["name"]] = parts
            elif found.op == "call_function":
                stack.extend(found.all_input_nodes)

    # --- which projections lead into attention -----------------------------------------------------

    def _into_attention(self) -> dict[Node, Parts]:
        """Projections by the heads that they make; one that makes queries and keys has a part for each."""
        made: dict[Node, dict[str, tuple[int, int]]] = {}
        for attention in self.graph.calls(*_ATTENTION):
            for role in _ATTENTION[op_name(attention) or ""]:
                value = argument(attention, role)
                heads, features = int(value.meta["val"].shape[1]), int(value.meta["val"].shape[3])
                for projection in self._projections(value, heads):
                    # What one head reads is whole; it matters only where it shares a matrix with queries.
                    if heads > 1 or projection in made:
                        made.setdefault(projection, {})[role] = (heads, heads * features)
        return {node: _parts(list(roles.values())) for node, roles in made.items()}

    def _projections(self, value: Node, heads: int) -> Iterator[Node]:
        """The projections that an attention's input comes from, past views, rotations and the cache."""
        seen: set[Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            name = op_name(node)
            if name in _LINEAR:
                yield node
            elif name == "routed_linear":
                stack.append(argument(node, "x"))
            elif node.meta.get("kind") == "state":
                stack.extend(u.args[1] for u in node.users if op_name(u) == "cache_append")  # type: ignore[misc]
            elif name not in (*_ATTENTION, *_FEED_FORWARD) and not _shared_by_heads(node, heads):
                stack.extend(node.all_input_nodes)


def _state_heads(state: Node) -> int:
    """Into how many heads a state divides: a store ``[B, G, S, D]``, or a part of a packed one.

    Pages ``[B, N, G, ...]`` divide if each has the heads of the tail apart; page counts are copied.
    """
    role = state.meta.get("store", {}).get("role", "tail")
    dim = {"tail": 1, "first": 1, "prefix": 1, "kept": 1, "ring": 1, "buffer": 2, "summary": 2}.get(role)
    size = state.meta["val"].shape[dim] if dim is not None and state.meta["val"].dim() > dim else 1
    return size if isinstance(size, int) else 1


def _parts(roles: list[tuple[int, int]]) -> Parts:
    features = sum(width for _, width in roles)
    return tuple((width / features, heads) for heads, width in roles)


def _shared_by_heads(node: Node, heads: int) -> bool:
    """Whether a value ``[B, 1, T, D]`` is handed to several heads, as a latent's rotary part is."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or heads == 1:
        return False
    return isinstance(value.shape[1], int) and value.shape[1] == 1


def _feeds_linear(node: Node) -> bool:
    """Whether the next projection reads a projection's results as they are, or after arithmetic on each.

    Then the two are a pair, of which the first divides by columns and the second by rows. A norm, or a sum
    over features, between them needs all columns.
    """
    stack, seen = list(node.users), set()
    while stack:
        user = stack.pop()
        name = op_name(user) or ""
        if user in seen or name in _ATTENTION or name in _NORMS or any(part in name for part in _REDUCTIONS):
            continue
        seen.add(user)
        if name in _LINEAR or name == "routed_linear":
            return True
        if name.startswith("aten.") or is_free(user):
            stack.extend(user.users)
    return False
