"""What activations hold at one time: the memory of a step beside weights and cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx.node import Node

from graphwright.cost_model.cost import B, C, T
from graphwright.cost_model.graph_cost import find_head
from graphwright.cost_model.shapes import Shapes, is_free, source, tensors
from graphwright.ir.graph import Graph, argument, op_name
from graphwright.ir.packed_ops import TILE

# Bytes of one sequence, as a constant and what each slot of its cache adds.
_Line = tuple[float, float]


@dataclass(frozen=True)
class Workspace:
    """The most bytes of activations alive at one time in a step, for any batch and capacity.

    Args:
        moments: for each moment of the step, what is alive of one sequence: bytes, and bytes a cache slot
            (what is computed again from a store is as long as the store).
    """

    moments: frozenset[_Line]

    def bytes(self, batch: int, slots: int) -> int:
        """For so many sequences with so many cache slots each."""
        return math.ceil(batch * max((fixed + slots * each for fixed, each in self.moments), default=0.0))

    def plus(self, nbytes: float) -> Workspace:
        """With so many bytes more of each sequence at every moment."""
        return (
            Workspace(frozenset((fixed + nbytes, each) for fixed, each in self.moments)) if nbytes else self
        )

    def or_plus(self, fixed: float, each: float) -> Workspace:
        """With so many bytes more of each sequence, and of each of its slots, at some times."""
        return Workspace(self.moments | {(a + fixed, b + each) for a, b in self.moments})


def workspace(graph: Graph, tokens: int, shares: Mapping[Node, float] | None = None) -> Workspace:
    """The workspace of a step that runs node by node.

    Views take nothing; what packed stores are read into exists a tile at a time. A value dies after its
    last reader. Fusion only needs less. A feed-forward block in one op holds its hidden activations while
    it runs. Logits count for the last token of each sequence only.

    Args:
        graph: on any device.
        tokens: of each sequence in the step.
        shares: the fraction of a node's values, or of a feed-forward's hidden ones, that one device holds,
            where it is not 1.
    """
    sizes, scratch = _sizes(graph, tokens, shares or {})
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        for value in node.all_input_nodes:
            last[source(value)] = node
    dying: dict[Node, list[_Line]] = {}
    for node, reader in last.items():
        dying.setdefault(reader, []).append(sizes.get(node, (0.0, 0.0)))
    alive, moments = (0.0, 0.0), set()
    for node in graph.nodes:
        alive = _add(alive, sizes.get(node, (0.0, 0.0)))
        moments.add(_add(alive, scratch.get(node, (0.0, 0.0))))
        for fixed, each in dying.get(node, ()):
            alive = _add(alive, (-fixed, -each))
    return Workspace(frozenset(moments))


def workspace_bytes(graph: Graph, batch: int, tokens: int, slots: int = 0) -> int:
    """:func:`workspace` for a batch of sequences with so many cache slots each."""
    return workspace(graph, tokens).bytes(batch, slots)


def _sizes(
    graph: Graph, tokens: int, shares: Mapping[Node, float]
) -> tuple[dict[Node, _Line], dict[Node, _Line]]:
    """What each node's results take, and what it holds besides while it runs."""
    shapes, head = Shapes(graph), find_head(graph)
    sizes: dict[Node, _Line] = {}
    scratch: dict[Node, _Line] = {}
    memo: dict[object, _Line] = {}
    after_head = False
    for node in graph.nodes:
        after_head = after_head or node is head
        if is_free(node):
            continue
        held = (0.0, 0.0)
        for tensor in tensors(node):
            held = _add(held, _line(shapes, tensor, 1 if after_head else tokens, memo))
        if node in shapes.streaming.runs:
            held = _tile(held)
        hidden, share = _hidden_copies(node), shares.get(node, 1.0)
        # What a feed-forward returns is whole on each device: only its hidden width is divided.
        sizes[node] = held if hidden else _scale(held, share)
        scratch[node] = _scale(held, hidden * share)
    return sizes, scratch


def _line(shapes: Shapes, tensor: torch.Tensor, tokens: int, memo: dict[object, _Line]) -> _Line:
    """A tensor's bytes, which grow in proportion to the batch and linearly in the slots."""
    size = shapes.nbytes(tensor)
    if (size, tokens) not in memo:
        fixed, more = (float(size.subs({B: 1, T: tokens, C: slots})) for slots in (0, 1))
        memo[size, tokens] = (fixed, more - fixed)
    return memo[size, tokens]


def _tile(line: _Line) -> _Line:
    """What of a streamed value exists at one time, whatever the slots."""
    return line[0] + TILE * line[1], 0.0


def _hidden_copies(node: Node) -> float:
    """The hidden activations of a feed-forward op, in sizes of its result: gate and up, or up alone."""
    name = op_name(node)
    if name not in ("gated_mlp", "mlp"):
        return 0.0
    width, features = argument(node, "up").meta["val"].shape
    return (2 if name == "gated_mlp" else 1) * int(width) / int(features)


def _add(one: _Line, two: _Line) -> _Line:
    return one[0] + two[0], one[1] + two[1]


def _scale(line: _Line, factor: float) -> _Line:
    return line[0] * factor, line[1] * factor
