"""Scatter: a tensor that is allocated empty and filled slice by slice becomes a concatenation.

DeepSeek-V3 assembles its keys so. A cut through the def-use edges of the filled tensor would miss
what was written into it.
"""

from __future__ import annotations

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, value
from graphwright.ir.layout import same_shape, same_type

aten = torch.ops.aten

_EMPTY = frozenset({aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default})


@raiser("scatter", after=("slices",))
def scatter(rewriter: Rewriter) -> None:
    """Turn chains of slice_scatter that fill an empty tensor completely into a cat."""
    for node in list(rewriter.graph.nodes):
        if node.target is aten.copy.default:
            _copied(rewriter, node)
    for node in reversed(list(rewriter.graph.nodes)):
        if node.target is aten.slice_scatter.default and node.users:
            _filled(rewriter, node)


def _copied(rewriter: Rewriter, node: Node) -> None:
    """``copy(into, x)`` is ``x`` in the dtype and shape of ``into``."""
    into, source = node.args[:2]
    assert isinstance(into, Node) and isinstance(source, Node)
    if value(source).device != value(node).device:
        return
    if value(source).dtype != value(node).dtype:
        source = rewriter.graph.emit(aten._to_copy.default, source, dtype=value(node).dtype, before=node)
    if not same_shape(value(source).shape, value(node).shape):
        sizes = [_size(rewriter, into, dim, node) for dim in range(value(node).dim())]
        source = rewriter.graph.emit(aten.expand.default, source, sizes, before=node)
    rewriter.redirect(node, source)
    rewriter.simplified["copy_into"] += 1


def _size(rewriter: Rewriter, node: Node, dim: int, before: Node) -> int | Node:
    size = value(node).shape[dim]
    return size if isinstance(size, int) else rewriter.graph.emit(aten.sym_size.int, node, dim, before=before)


def _filled(rewriter: Rewriter, last: Node) -> None:
    pieces: dict[tuple[int, int], Node] = {}
    dim: int | None = None
    node: object = last
    while isinstance(node, Node) and node.target is aten.slice_scatter.default:
        into, piece = node.args[:2]
        assert isinstance(into, Node) and isinstance(piece, Node)
        at = argument(node, "dim") % value(node).dim()
        size = value(node).shape[at]
        start, end, step = (argument(node, name) for name in ("start", "end", "step"))
        numbers = all(not isinstance(n, Node | torch.SymInt) for n in (start, end, step, size))
        if not numbers or step != 1 or dim not in (None, at):
            return
        dim = at
        start, end, _ = slice(start, end, step).indices(size)
        pieces[start, end] = piece
        node = into
    if not isinstance(node, Node) or node.target not in _EMPTY or dim is None:
        return
    spans = sorted(pieces)
    edges = [0, *(end for _, end in spans)]
    complete = [start for start, _ in spans] == edges[:-1] and edges[-1] == value(last).shape[dim]
    if not complete or any(value(pieces[span]).dtype != value(last).dtype for span in spans):
        return
    new = rewriter.replace(last, aten.cat.default, [pieces[span] for span in spans], dim)
    assert same_type(value(new), value(last))
    rewriter.simplified["slice_scatter"] += 1
