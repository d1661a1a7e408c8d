"""Raises linear layers: ``aten.linear``, ``addmm``, ``mm`` and ``matmul`` with a parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter, is_weight
from graphwright.ir.graph import argument, value
from graphwright.ir.layout import same_shape, same_size
from graphwright.ir.matcher import is_a

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mm.default, aten.matmul.default})
_TRANSPOSES = frozenset({aten.t.default, aten.transpose.int, aten.permute.default, aten.mT.default})


@dataclass(frozen=True)
class _Linear:
    """A product that may be a linear: ``weight`` is ``[K, N]`` if ``transposed``, else ``[N, K]``."""

    x: Node
    weight: Node
    bias: Node | None
    transposed: bool


@raiser("linear", after=("cleanup",))
def linear(rewriter: Rewriter) -> None:
    """Raise products with a parameter into ``linear``, without the views that flatten tokens."""
    for node in reversed(list(rewriter.graph.nodes)):
        found = _read(node)
        if found is None:
            continue
        reason = _why_not(found)
        if reason is None:
            _raise(rewriter, node, found)
        elif node.target not in _PRODUCTS:  # a product of two activations is no linear gone wrong
            rewriter.near_miss("linear", node, reason)


def _read(node: Node) -> _Linear | None:
    if node.target is aten.linear.default:
        bias = argument(node, "bias")
        return _Linear(node.args[0], node.args[1], bias, False)  # type: ignore[arg-type]
    if node.target is aten.addmm.default:
        if argument(node, "alpha") != 1 or argument(node, "beta") != 1:
            return None
        bias, x, weight = node.args[:3]
        return _Linear(x, weight, bias, True)  # type: ignore[arg-type]
    if node.target in _PRODUCTS:
        x, weight = node.args[:2]
        if value(weight).dim() == 2:  # type: ignore[arg-type]
            return _Linear(x, weight, None, True)  # type: ignore[arg-type]
    return None


def _why_not(found: _Linear) -> str | None:
    if not is_weight(found.weight):
        return f"its weight {found.weight.name} is not a parameter"
    if found.bias is not None and not is_weight(found.bias):
        return f"its bias {found.bias.name} is not a parameter"
    if value(found.weight).dim() != 2:
        return f"its weight has {value(found.weight).dim()} dimensions"
    if found.bias is not None and value(found.bias).dim() != 1:
        return f"its bias has {value(found.bias).dim()} dimensions"
    return None


def _raise(rewriter: Rewriter, node: Node, found: _Linear) -> None:
    x, result = _unflattened(node, found.x)
    weight = _rows(rewriter, found.weight, result) if found.transposed else found.weight
    rest = () if found.bias is None else (found.bias,)
    rewriter.replace(result, "linear", x, weight, *rest)


def _rows(rewriter: Rewriter, weight: Node, before: Node) -> Node:
    """A ``[K, N]`` weight as ``[N, K]``: what it was transposed from, or its transpose (a view)."""
    if weight.target in _TRANSPOSES and value(weight.args[0]).dim() == 2:
        source = weight.args[0]
        assert isinstance(source, Node)
        if not same_shape(value(source).shape, value(weight).shape) or weight.target is aten.t.default:
            return source
    return rewriter.graph.emit(aten.t.default, weight, before=before)


def _unflattened(node: Node, x: Node) -> tuple[Node, Node]:
    """Input and result of a product without ``view(x, [-1, K])`` before and its reverse after it."""
    if not is_a(x, "view") or len(node.users) != 1:
        return x, node
    source, result = x.args[0], next(iter(node.users))
    assert isinstance(source, Node)
    if not is_a(result, "view"):
        return x, node
    inner, outer = value(source).shape, value(result).shape
    if not same_size(inner[-1], value(x).shape[-1]):
        return x, node
    restored = same_shape(inner[:-1], outer[:-1]) and same_size(outer[-1], value(node).shape[-1])
    return (source, result) if restored else (x, node)
