"""Raises plain feed-forward layers: GPT-2, GPT-NeoX, OPT, Starcoder2."""

from __future__ import annotations

from torch.fx.node import Node

from graphwright.ir.canonicalize.activations import is_affine, recognize, region
from graphwright.ir.canonicalize.feed_forward import biases, common_module_stack, projection
from graphwright.ir.canonicalize.registry import raiser
from graphwright.ir.canonicalize.rewriter import Rewriter
from graphwright.ir.graph import argument, value
from graphwright.ir.matcher import shared_outside


@raiser("mlp", after=("linear",))
def mlp(rewriter: Rewriter) -> None:
    """Raise ``down(act(up(x)))`` into ``mlp``."""
    for down in reversed(rewriter.graph.calls("linear")):
        hidden = argument(down, "x")
        assert isinstance(hidden, Node)
        between = region(hidden)
        if between is None or not between.nodes or len(between.leaves) != 1:
            continue
        up = projection(between.leaves[0])
        if up is None:
            continue
        name = recognize(between)
        if name is None:
            if not is_affine(between):  # two linears with a factor between them are no feed-forward layer
                rewriter.near_miss("mlp", hidden, "its activation is none of those that mlp knows")
            continue
        if value(hidden).dtype != value(up.node).dtype:
            rewriter.near_miss("mlp", hidden, f"its activation is rounded to {value(hidden).dtype}")
            continue
        inside = between.nodes | up.nodes | {down}
        reason = shared_outside(inside, down)
        if reason is not None:
            rewriter.near_miss("mlp", down, reason)
            continue
        weight, bias = up.weights(rewriter, down)
        rest = biases(bias, argument(down, "bias"))
        new = rewriter.replace(down, "mlp", up.x, weight, argument(down, "weight"), *rest, activation=name)
        new.meta["nn_module_stack"] = common_module_stack(inside)
