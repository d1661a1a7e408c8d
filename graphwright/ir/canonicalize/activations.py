"""Recognizes activation functions by what they compute.

``0.5 * x * (1 + tanh(...))`` has many spellings. Instead of listing them, the pointwise nodes
between two linears are run in float64 on a grid of numbers and compared with each activation that
the ops know: the same numbers are the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx.node import Node, map_arg

from graphwright.ir.matcher import is_a
from graphwright.ir.ops import ACTIVATIONS

aten = torch.ops.aten

# fmt: off
_NAMES = (
    "mul", "add", "sub", "div", "pow", "neg", "tanh", "sigmoid", "erf", "exp", "relu", "relu6", "silu",
    "gelu", "clamp", "clamp_min", "clamp_max", "softplus", "square", "abs", "sqrt", "rsqrt", "reciprocal",
    "minimum", "maximum", "leaky_relu", "elu", "hardswish", "hardsigmoid", "hardtanh", "mish",
    "log1p", "expm1", "log_sigmoid",
)
# fmt: on
POINTWISE = frozenset(
    getattr(getattr(aten, name), overload) for name in _NAMES for overload in getattr(aten, name).overloads()
)
_LIMIT = 24  # nodes; the longest spelling of an activation that is known has eleven


@dataclass(frozen=True)
class Region:
    """Pointwise nodes that end in one root, and the values that they start from."""

    root: Node
    nodes: frozenset[Node]
    leaves: tuple[Node, ...]


def region(root: Node) -> Region | None:
    """The pointwise nodes above ``root``; None if there are too many or more than two leaves."""
    nodes: set[Node] = set()
    leaves: dict[Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in nodes or node in leaves:
            continue
        if node.target in POINTWISE or is_a(node, "cast"):
            nodes.add(node)
            stack.extend(node.all_input_nodes)
        else:
            leaves[node] = None
        if len(nodes) > _LIMIT or len(leaves) > 2:
            return None
    return Region(root, frozenset(nodes), tuple(leaves))


def recognize(found: Region) -> str | None:
    """The name in :data:`ACTIVATIONS` of the function that a region with one leaf computes, or None."""
    result = _evaluate(found)
    for name, expected in _references().items():
        if torch.allclose(result, expected, rtol=1e-7, atol=1e-9):
            return name
    return None


def is_affine(found: Region) -> bool:
    """Whether a region with one leaf only scales and shifts: no activation at all."""
    bends = torch.diff(_evaluate(found), n=2)
    return bool((bends.abs() < 1e-9).all())


def _evaluate(found: Region) -> torch.Tensor:
    """The region's result on the grid, in float64: casts are left out."""
    values: dict[Node, Any] = {found.leaves[0]: _grid()}
    for node in _in_order(found):
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = args[0] if is_a(node, "cast") else node.target(*args, **kwargs)  # type: ignore[operator]
    result: torch.Tensor = values[found.root]
    return result


def _in_order(found: Region) -> Iterator[Node]:
    done: set[Node] = set(found.leaves)

    def visit(node: Node) -> Iterator[Node]:
        if node in done:
            return
        done.add(node)
        for source in node.all_input_nodes:
            yield from visit(source)
        yield node

    return visit(found.root)


@cache
def _grid() -> torch.Tensor:
    return torch.linspace(-12.0, 12.0, 193, dtype=torch.float64, device="cpu")


@cache
def _references() -> dict[str, torch.Tensor]:
    return {name: function(_grid()) for name, function in ACTIVATIONS.items()}
