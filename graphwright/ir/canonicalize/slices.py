"""Slices: split and chunk become slices with plain bounds, so that later raisers see one spelling."""

from __future__ import annotations

import operator

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, value

aten = torch.ops.aten

_SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.tensor_split.sections,
    }
)


@raiser("slices")
def slices(rewriter: Rewriter) -> None:
    """Turn the parts of splits into slices, and write slice bounds out."""
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            _part_of_split(rewriter, node)
        elif node.target is aten.slice.Tensor:
            _plain_bounds(node)


def _part_of_split(rewriter: Rewriter, node: Node) -> None:
    split, index = node.args
    if not isinstance(split, Node) or split.target not in _SPLITS or not isinstance(index, int):
        return
    source = split.args[0]
    assert isinstance(source, Node)
    whole = value(source)
    dim = argument(split, "dim") % whole.dim()
    sizes = [part.shape[dim] for part in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return  # a split of the batch or of the tokens: its bounds are not numbers
    index %= len(sizes)
    start = sum(sizes[:index])
    rewriter.replace(node, aten.slice.Tensor, source, dim, start, start + sizes[index])
    rewriter.simplified["split"] += 1


def _plain_bounds(node: Node) -> None:
    """``slice(x, -1, 8, 2**63 - 1)`` of 16 elements as ``slice(x, rank - 1, 8, 16)``."""
    source = node.args[0]
    assert isinstance(source, Node)
    whole = value(source)
    dim = argument(node, "dim") % whole.dim()
    size = whole.shape[dim]
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if not isinstance(size, int) or isinstance(start, Node) or isinstance(end, Node):
        return
    start, end, step = slice(start, end, step).indices(size)
    node.args = (source, dim, start, end) if step == 1 else (source, dim, start, end, step)
    node.kwargs = {}


def bounds(node: Node) -> tuple[int, int, int, int]:
    """``(dim, start, end, step)`` of a slice with plain bounds."""
    dim, start, end = node.args[1:4]
    step = node.args[4] if len(node.args) > 4 else 1
    return dim, start, end, step  # type: ignore[return-value]


def is_plain(node: Node) -> bool:
    """Whether a slice has plain bounds: numbers, none left out."""
    return len(node.args) >= 4 and all(isinstance(number, int) for number in node.args[1:])
