"""What keys and values that are computed from the cache are made of.

Between the stores and an attention lie one or two linears and operations that only move data: views,
transposes, slices, expansions, concatenations, in whatever order the model and canonicalization left
them. Instead of matching spellings, this module runs the movements once on small integer tensors in
which every element says where it came from, and reads the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.node import Node, map_arg

from graphwright.ir.graph import Graph, argument, is_tensor, op_name, value

# Operations that move elements and change none.
_MOVES = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "slice",
    "select", "cat", "flatten", "unflatten", "clone", "contiguous", "alias", "split",
    "split_with_sizes", "chunk",
}  # fmt: skip
# Rows and slots that labels are made for: enough to tell a row from a slot.
_ROWS, _SLOTS = 2, 3
_FEATURES = 1 << 32


class Unexpected(Exception):
    """Keys or values are not a projection of what is stored; the message says why, for the report."""


@dataclass(frozen=True)
class Segment:
    """Consecutive features of keys or values with one origin.

    Attributes:
        origin: the linear that computes them, or the store that holds them.
        first: for each key/value head, the weight row or stored feature of the segment's first feature;
            the others follow one by one.
        start, stop: where the segment lies in the head's features.
    """

    origin: Node
    first: tuple[int, ...]
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Features of one head."""
        return self.stop - self.start


@dataclass(frozen=True)
class Expansion:
    """Keys and values of one attention as projections of one stored latent.

    Attributes:
        keys: the features that a linear computes from the latent.
        values: all value features, computed by a linear from the same latent.
        direct: key features that are stored as they are and shared by all heads, or None.
        latent, shared: the stores ``[B, 1, S, r]`` and ``[B, 1, S, dr]`` (None without ``direct``).
        groups: key/value heads.
        nodes: the calls that expand; attention alone reads their results.
    """

    keys: Segment
    values: Segment
    direct: Segment | None
    latent: Node
    shared: Node | None
    groups: int
    nodes: tuple[Node, ...]


def find_expansion(graph: Graph, attention: Node) -> Expansion:
    """How the keys and values of a ``cache_attention`` come from its stores.

    Raises:
        Unexpected: they are something else than projections of one stored latent.
    """
    keys, values = argument(attention, "keys"), argument(attention, "values")
    labels = _Labels(graph)
    key_parts, value_parts = labels.segments(keys), labels.segments(values)
    projected = [part for part in key_parts if part.origin.op == "call_function"]
    direct = [part for part in key_parts if part.origin.op == "placeholder"]
    if len(projected) != 1 or len(direct) > 1:
        raise Unexpected("keys are not one projection of a stored tensor and at most one stored part")
    if len(value_parts) != 1 or value_parts[0].origin.op != "call_function":
        raise Unexpected("values are not one projection of a stored tensor")
    key, stored = projected[0], direct[0] if direct else None
    latent = labels.input_of[key.origin]
    if labels.input_of[value_parts[0].origin] is not latent:
        raise Unexpected("keys and values are projections of different stored tensors")
    shared = None if stored is None else stored.origin
    if stored is not None and (set(stored.first) != {0} or stored.width != value(stored.origin).shape[3]):
        raise Unexpected("the stored part of the keys is not the same whole tensor for every head")
    nodes = tuple(n for n in graph.nodes if n in labels.calls)
    return Expansion(key, value_parts[0], stored, latent, shared, int(value(keys).shape[1]), nodes)


class _Labels:
    """Evaluates data movements on labels; remembers what it evaluated."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        #: The store that each linear reads.
        self.input_of: dict[Node, Node] = {}
        self.calls: set[Node] = set()
        self._origins: list[Node] = []
        self._known: dict[Node, Any] = {}
        self._sizes: dict[Any, Any] = {}
        for state in graph.placeholders("state"):
            rows, slots = value(state).shape[0], value(state).shape[2]
            self._sizes |= {rows.node.expr: sympy.Integer(_ROWS), slots.node.expr: sympy.Integer(_SLOTS)}

    def segments(self, root: Node) -> list[Segment]:
        """The origins of a ``[B, G, S, D]`` node, in the order of its features."""
        found = self._evaluate(root)
        rows, groups, slots, _ = found.shape
        if (rows, slots) != (_ROWS, _SLOTS):
            raise Unexpected("keys or values are not laid out as [batch, heads, tokens, features]")
        place, table = found.div(_FEATURES, rounding_mode="floor"), found % _FEATURES
        origin = place.div(_ROWS * _SLOTS, rounding_mode="floor")
        at = torch.arange(_ROWS * _SLOTS).view(_ROWS, 1, _SLOTS, 1)
        if not torch.equal(place % (_ROWS * _SLOTS), at.expand_as(place)):
            raise Unexpected("a slot's keys or values come from another slot")
        if not (_constant(origin, (0, 1, 2)) and _constant(table, (0, 2))):
            raise Unexpected("heads or slots are computed in different ways")
        return _runs(origin[0, 0, 0].tolist(), table[0, :, 0].tolist(), self._origins, groups)

    def _evaluate(self, node: Node) -> Any:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._known:
                stack.pop()
                continue
            waiting = [n for n in self._operands(top) if n not in self._known]
            if waiting:
                stack.extend(waiting)
                continue
            self._known[stack.pop()] = self._value_of(top)
        return self._known[node]

    def _operands(self, node: Node) -> list[Node]:
        if node.op != "call_function" or not is_tensor(node):
            return []
        if op_name(node) == "linear":
            return [argument(node, "x")]
        return [n for n in node.all_input_nodes if is_tensor(n)] if _is_move(node) else []

    def _value_of(self, node: Node) -> Any:
        if node.op == "placeholder" and node.meta["kind"] == "state":
            return self._stored(node)
        if not is_tensor(node):
            raise Unexpected(f"{node.name} is not a tensor")
        if op_name(node) == "linear":
            self.calls.add(node)
            return self._projected(node)
        if not _is_move(node):
            raise Unexpected(_obstacle(node))
        self.calls.add(node)
        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), self._argument)
        return node.target(*args, **kwargs)

    def _argument(self, node: Node) -> Any:
        return self._known[node] if is_tensor(node) else self._size(node.meta["val"])

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        number = sympy.sympify(size.node.expr.xreplace(self._sizes))
        if not number.is_Integer:
            raise Unexpected(f"the size {size} is neither of the batch nor of the cache")
        return int(number)

    def _stored(self, node: Node) -> torch.Tensor:
        groups, features = int(value(node).shape[1]), int(value(node).shape[3])
        if groups != 1:
            raise Unexpected("what is stored has heads of its own")
        self._origins.append(node)
        return self._label(len(self._origins) - 1, features).view(_ROWS, 1, _SLOTS, features)

    def _projected(self, node: Node) -> torch.Tensor:
        x: torch.Tensor = self._known[argument(node, "x")]
        store = self._origins[int(x.flatten()[0]) // (_FEATURES * _ROWS * _SLOTS)]
        whole = self._known.get(store)
        if store.op != "placeholder" or whole is None or not torch.equal(x.flatten(), whole.flatten()):
            raise Unexpected("the projection does not read a stored tensor as it is")
        if store.meta["kind"] != "state" or _source_kind(argument(node, "weight")) != "parameter":
            raise Unexpected("the projection's matrix is not a parameter")
        self.input_of[node] = store
        self._origins.append(node)
        rows = int(value(argument(node, "weight")).shape[0])
        return self._label(len(self._origins) - 1, rows).view(*x.shape[:-1], rows)

    @staticmethod
    def _label(origin: int, features: int) -> torch.Tensor:
        """``[rows * slots, features]``: who made it, for which row and slot, which feature."""
        place = origin * _ROWS * _SLOTS + torch.arange(_ROWS * _SLOTS)
        return place[:, None] * _FEATURES + torch.arange(features)


def _is_move(node: Node) -> bool:
    name = op_name(node) or ""
    return name.startswith("aten.") and name.split(".")[1] in _MOVES


def _obstacle(node: Node) -> str:
    name = op_name(node)
    if name == "rotary":
        return "the rotary embedding lies between the projection and the attention"
    if node.op == "placeholder":
        return f"{node.meta['name']} lies between what is stored and the attention"
    return f"{name} lies between what is stored and the attention"


def _source_kind(node: Node) -> str | None:
    """``parameter`` for a parameter or a view of one."""
    while node.op == "call_function" and _is_move(node) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.meta.get("kind")


def _constant(labels: torch.Tensor, dims: Sequence[int]) -> bool:
    first = labels
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return torch.equal(labels, first.expand_as(labels))


def _runs(origins: list[int], table: list[list[int]], nodes: list[Node], groups: int) -> list[Segment]:
    """Cut the features where the origin changes or a head's rows stop following one another."""
    starts = [0]
    for at in range(1, len(origins)):
        follows = all(rows[at] == rows[at - 1] + 1 for rows in table)
        if origins[at] != origins[at - 1] or not follows:
            starts.append(at)
    stops = [*starts[1:], len(origins)]
    return [
        Segment(nodes[origins[start]], tuple(table[g][start] for g in range(groups)), start, stop)
        for start, stop in zip(starts, stops, strict=True)
    ]
