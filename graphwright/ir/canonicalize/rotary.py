"""Raises rotary position embeddings, in all layouts of pairs and both widths of cos and sin."""

from __future__ import annotations

import torch
from torch.fx.node import Node

from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.canonicalize.slices import bounds, is_plain
from graphwright.ir.graph import value
from graphwright.ir.layout import same_shape, same_type
from graphwright.ir.matcher import (
    Match,
    Pattern,
    add,
    call,
    capture,
    casts,
    cat_last,
    either,
    find,
    interleave_last,
    match_at,
    mul,
    sub,
)

# How pairs lie in the input and in the output, by the layout's name in the op.
LAYOUTS = {
    "half": ("half", "half"),
    "interleaved": ("interleaved", "interleaved"),
    "interleaved_to_half": ("interleaved", "half"),
}


def _part(which: int, reading: str) -> Pattern:
    """The first or second members of all pairs of ``x``."""

    def where(node: Node) -> bool:
        if not is_plain(node):
            return False
        dim, start, end, step = bounds(node)
        whole = value(node.args[0])
        size = whole.shape[-1]
        if dim != whole.dim() - 1 or not isinstance(size, int) or size % 2:
            return False
        if reading == "half":
            return (start, end, step) == (which * size // 2, (which + 1) * size // 2, 1)
        return start == which and step == 2 and end >= size - 1 + which

    return call("slice", capture("x"), where=where)


def _pattern(reading: str, writing: str) -> Pattern:
    """``x * cos + turn(x) * sin``, in full width or pair by pair."""
    first, second = _part(0, reading), _part(1, reading)
    cos, sin = capture("cos"), capture("sin")
    join = cat_last if writing == "half" else interleave_last
    straight = casts(capture("x")) if reading == writing else join(first, second)
    turned = join(call("neg", second), first)
    whole = add(mul(casts(turned), sin), mul(straight, cos))
    low = sub(mul(casts(first), cos), mul(casts(second), sin))
    high = add(mul(casts(second), cos), mul(casts(first), sin))
    return casts(either(whole, join(low, high)))


PATTERNS = {name: _pattern(*how) for name, how in LAYOUTS.items()}
_ROTATE_HALF = cat_last(call("neg", _part(1, "half")), _part(0, "half"))


@raiser("rotary", after=("cleanup",))
def rotary(rewriter: Rewriter) -> None:
    """Raise ``x * cos + rotate(x) * sin`` into ``rotary``."""
    for layout, pattern in PATTERNS.items():
        for match in find(rewriter.graph, pattern, _faithful):
            reason = match.refusal()
            if reason is not None:
                rewriter.near_miss("rotary", match.root, reason)
                continue
            options = {} if layout == "half" else {"layout": layout}
            rewriter.replace(match.root, "rotary", match["x"], match["cos"], match["sin"], **options)
    rewriter.graph.eliminate_dead_code()
    for node in rewriter.graph.nodes:
        if node.op == "call_function" and match_at(node, _ROTATE_HALF) is not None:
            rewriter.near_miss("rotary", node, "a rotated half that is not combined with x, cos and sin")


def _faithful(match: Match) -> bool:
    """Whether ``rotary`` with these arguments has the shapes and the rounding of the graph."""
    x, cos, sin = (value(match[name]) for name in ("x", "cos", "sin"))
    if not same_type(value(match.root), x) or cos.dtype != sin.dtype or not same_shape(cos.shape, sin.shape):
        return False
    product = torch.promote_types(x.dtype, cos.dtype)
    arithmetic = {value(n).dtype for n in match.nodes if n.target in (_MUL, _ADD, _SUB)}
    return cos.shape[-1] in (x.shape[-1], x.shape[-1] // 2) and arithmetic == {product}


_MUL, _ADD, _SUB = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor
