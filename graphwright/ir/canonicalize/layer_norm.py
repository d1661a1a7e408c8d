"""Raises layer norms over the last dimension."""

from __future__ import annotations

import operator

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, value

aten = torch.ops.aten


@raiser("layer_norm", after=("cleanup",))
def layer_norm(rewriter: Rewriter) -> None:
    """Raise ``aten.layer_norm`` (or the first result of the native one) into ``layer_norm``."""
    for node in list(rewriter.graph.nodes):
        if node.target is aten.layer_norm.default:
            _raise(rewriter, node, node)
        elif node.target is aten.native_layer_norm.default:
            _native(rewriter, node)


def _native(rewriter: Rewriter, norm: Node) -> None:
    parts = {user.args[1]: user for user in norm.users if user.target is operator.getitem}
    if set(parts) - {0} or 0 not in parts:
        rewriter.near_miss("layer_norm", norm, "its mean or its deviation is read too")
        return
    _raise(rewriter, norm, parts[0])


def _raise(rewriter: Rewriter, norm: Node, result: Node) -> None:
    source = norm.args[0]
    assert isinstance(source, Node)
    shape = argument(norm, "normalized_shape")
    if len(shape) != 1:
        rewriter.near_miss(
            "layer_norm", norm, f"it normalizes over {len(shape)} dimensions, not over the last one"
        )
        return
    weight, bias, eps = (argument(norm, name) for name in ("weight", "bias", "eps"))
    if value(source).dtype != value(result).dtype:
        rewriter.near_miss("layer_norm", norm, "its result has another dtype than its input")
        return
    rewriter.replace(result, "layer_norm", source, weight, bias, eps)
