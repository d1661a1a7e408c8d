"""How many tokens a layer holds whose tokens are evicted, for prices."""

from __future__ import annotations

import sympy
from torch.fx.node import Node

from graphwright.cost_model.cost import C, Expr
from graphwright.ir.eviction_ops import KEPT, Retention


def retention_of(state: Node) -> Retention | None:
    """What a store keeps; None if it keeps everything."""
    about = state.meta.get("store", {})
    return Retention.of(about) if about.get("role") == KEPT else None


def held_tokens(kept: Retention) -> Expr:
    """Tokens of a sequence that a layer holds on average, before a step over a context of C."""
    return sympy.Min(C, most_held(kept))


def most_held(kept: Retention) -> Expr:
    """What it holds on average between two evictions.

    A fraction of the capacity is priced as that fraction of the context: the capacity is no part of a cost.
    """
    fraction = sympy.nsimplify(kept.keep, rational=True)
    budget = sympy.Integer(kept.tokens) if kept.tokens else sympy.Max(kept.least, fraction * C)
    return budget + sympy.Rational(kept.interval, 2)


def visible_window(node: Node, window: int) -> Expr:
    """The window of an attention, in whose place is what it holds where tokens are evicted; 0: everything."""
    kept = next((found for state in node.all_input_nodes if (found := retention_of(state))), None)
    return window if kept is None else most_held(kept) + 1
