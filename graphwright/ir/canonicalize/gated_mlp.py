"""Raises gated feed-forward layers (SwiGLU, GeGLU), with separate or packed gate and up weights."""

from __future__ import annotations

from torch.fx.node import Node

from graphwright.ir.canonicalize.activations import Region, recognize, region
from graphwright.ir.canonicalize.feed_forward import (
    Projection,
    biases,
    common_module_stack,
    projection,
)
from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, value
from graphwright.ir.layout import same_type
from graphwright.ir.matcher import is_a, shared_outside


@raiser("gated_mlp", after=("linear",))
def gated_mlp(rewriter: Rewriter) -> None:
    """Raise ``down(act(gate(x)) * up(x))`` into ``gated_mlp``."""
    for down in reversed(rewriter.graph.calls("linear")):
        hidden = argument(down, "x")
        assert isinstance(hidden, Node)
        between = region(hidden)
        if between is None or len(between.leaves) != 2:
            continue
        pair = [projection(leaf) for leaf in between.leaves]
        if any(p is None for p in pair) or pair[0].x is not pair[1].x:  # type: ignore[union-attr]
            continue
        _raise(rewriter, down, hidden, between)


def _raise(rewriter: Rewriter, down: Node, hidden: Node, between: Region) -> None:
    parts = _gate_and_up(hidden)
    if parts is None:
        if is_a(hidden, "mul"):
            rewriter.near_miss("gated_mlp", hidden, "it is not an activated gate times a projection")
        return
    activated, up = parts
    gate = projection(activated.leaves[0])
    assert gate is not None
    name = recognize(activated)
    if name is None:
        rewriter.near_miss(
            "gated_mlp", activated.root, "its activation is none of those that gated_mlp knows"
        )
        return
    if not same_type(value(gate.node), value(up.node)) or not same_type(value(hidden), value(up.node)):
        rewriter.near_miss("gated_mlp", hidden, "gate, up and their product differ in shape or dtype")
        return
    inside = between.nodes | gate.nodes | up.nodes | {down}
    reason = shared_outside(inside, down)
    if reason is not None:
        rewriter.near_miss("gated_mlp", down, reason)
        return
    gate_weight, gate_bias = gate.weights(rewriter, down)
    up_weight, up_bias = up.weights(rewriter, down)
    rest = biases(gate_bias, up_bias, argument(down, "bias"))
    new = rewriter.replace(
        down, "gated_mlp", gate.x, gate_weight, up_weight, argument(down, "weight"), *rest, activation=name
    )
    new.meta["nn_module_stack"] = common_module_stack(inside)


def _gate_and_up(hidden: Node) -> tuple[Region, Projection] | None:
    """The two factors of the hidden layer: which is activated, which is a projection as it is."""
    if not is_a(hidden, "mul"):
        return None
    factors = [a for a in hidden.args[:2] if isinstance(a, Node)]
    for one, other in (factors, factors[::-1]):
        up, activated = projection(other), region(one)
        if up is None or activated is None or not activated.nodes or len(activated.leaves) != 1:
            continue
        return activated, up
    return None
