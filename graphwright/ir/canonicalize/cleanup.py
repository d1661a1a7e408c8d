"""Cleanup: what computes nothing goes, so that later raisers see one spelling.

Each rule is a function from a call to the node that has the same value already, or None.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, is_tensor, value
from graphwright.ir.layout import same_layout, same_size, same_type
from graphwright.ir.matcher import FAMILIES, is_a

aten = torch.ops.aten

Rule = Callable[[Node], "Node | None"]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Register a rule; it says which existing node a call is equal to."""

    def register(run: Rule) -> Rule:
        RULES[name] = run
        return run

    return register


@raiser("cleanup", after=("slices", "scatter"))
def cleanup(rewriter: Rewriter) -> None:
    """Remove casts, views, copies, dropout and factors that change nothing."""
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function" or not is_tensor(node):
            continue
        for name, run in RULES.items():
            same = run(node)
            if same is not None:
                rewriter.redirect(node, same)
                rewriter.simplified[name] += 1
                break


_VIEWS = FAMILIES["view"].targets | {aten.expand.default, aten.slice.Tensor}
_COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default})
_ALIASES = frozenset({aten.alias.default, aten.detach.default})


@rule("alias")
def _alias(node: Node) -> Node | None:
    return _first(node) if node.target in _ALIASES else None


@rule("cast")
def _cast(node: Node) -> Node | None:
    """A conversion to the dtype that its input has."""
    source = _first(node)
    return source if is_a(node, "cast") and same_type(value(node), value(source)) else None


@rule("view")
def _view(node: Node) -> Node | None:
    """A view, expansion or slice of everything."""
    source = _first(node)
    return source if node.target in _VIEWS and same_type(value(node), value(source)) else None


@rule("copy")
def _copy(node: Node) -> Node | None:
    """A copy into the layout that its input has; a copy that changes strides was asked for."""
    source = _first(node)
    return source if node.target in _COPIES and same_layout(value(node), value(source)) else None


@rule("dropout")
def _dropout(node: Node) -> Node | None:
    """Dropout outside training, or of nothing."""
    if node.target is not aten.dropout.default:
        return None
    idle = not argument(node, "train") or argument(node, "p") == 0
    return _first(node) if idle else None


@rule("factor")
def _factor(node: Node) -> Node | None:
    """A multiplication with or division by one that promotes no dtype."""
    if not (is_a(node, "mul") or is_a(node, "div")):
        return None
    a, b = node.args[:2]
    if isinstance(a, Node) and _is_one(b) and same_type(value(node), value(a)):
        return a
    if is_a(node, "mul") and isinstance(b, Node) and _is_one(a) and same_type(value(node), value(b)):
        return b
    return None


@rule("cat")
def _cat(node: Node) -> Node | None:
    """A concatenation of one tensor; empty ones do not count (Phi-3 with full rotary)."""
    if node.target is not aten.cat.default:
        return None
    dim = argument(node, "dim")
    pieces = [n for n in argument(node, "tensors") if not same_size(value(n).shape[dim], 0)]
    alone = len(pieces) == 1 and same_type(value(node), value(pieces[0]))
    return pieces[0] if alone else None


def _first(node: Node) -> Node:
    source = node.args[0] if node.args else None
    return source if isinstance(source, Node) else node


def _is_one(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number == 1
