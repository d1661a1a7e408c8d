"""What the two kinds of feed-forward layers share: projections and the region between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.canonicalize.slices import bounds, is_plain
from graphwright.ir.graph import argument, op_name, value
from graphwright.ir.matcher import is_a

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """A linear, or some of the outputs of a packed one.

    Args:
        node: what is read.
        call: the linear.
        rows: start, end and step of the weight's rows that it is made from; None for all of them.
    """

    node: Node
    call: Node
    rows: tuple[int, int, int] | None

    @property
    def x(self) -> Node:
        """The linear's input."""
        found = argument(self.call, "x")
        assert isinstance(found, Node)
        return found

    @property
    def nodes(self) -> frozenset[Node]:
        """The nodes that the projection consists of."""
        return frozenset({self.node, self.call})

    def weights(self, rewriter: Rewriter, before: Node) -> tuple[Node, Node | None]:
        """Weight and bias of just these outputs: views of the packed ones."""
        weight, bias = argument(self.call, "weight"), argument(self.call, "bias")
        if self.rows is None:
            return weight, bias
        start, end, step = self.rows
        cut = (0, start, end) if step == 1 else (0, start, end, step)
        parts = []
        for packed in (weight, bias):
            part = None
            if packed is not None:
                part = rewriter.graph.emit(aten.slice.Tensor, packed, *cut, before=before)
                part.meta["nn_module_stack"] = self.call.meta.get("nn_module_stack")
            parts.append(part)
        return parts[0], parts[1]


def projection(node: Node) -> Projection | None:
    """``node`` as a linear or as a part of a packed linear's outputs, or None."""
    if op_name(node) == "linear":
        return Projection(node, node, None)
    if is_a(node, "slice") and is_plain(node):
        call = node.args[0]
        assert isinstance(call, Node)
        dim, start, end, step = bounds(node)
        if op_name(call) == "linear" and dim == value(call).dim() - 1:
            return Projection(node, call, (start, end, step))
    return None


def biases(*found: Node | None) -> tuple[Node | None, ...]:
    """Trailing bias arguments; none of them if no projection has a bias."""
    return found if any(bias is not None for bias in found) else ()


def common_module_stack(nodes: frozenset[Node]) -> dict[str, Any]:
    """The innermost module that all nodes came from, as ``meta["nn_module_stack"]`` has it."""
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in nodes]
    shared = [level[0] for level in zip(*stacks, strict=False) if all(item == level[0] for item in level)]
    return dict(shared)
