"""Canonicalization: what dynamo saw, raised into semantic ops.

After it, passes match ops and never ATen patterns. Each file raises one op (or cleans up before);
the order is computed from what each declares to need.
"""

from __future__ import annotations

from graphwright.ir.canonicalize import (  # noqa: F401  (importing registers the raisers)
    cleanup,
    gated_mlp,
    layer_norm,
    linear,
    mlp,
    rms_norm,
    rotary,
    scatter,
    slices,
)
from graphwright.ir.canonicalize.registry import RAISERS, Raiser, in_order, raiser
from graphwright.ir.canonicalize.rewriter import (
    CanonicalizationReport,
    NearMiss,
    Rewriter,
    name_in_order,
)
from graphwright.ir.graph import Graph

__all__ = [
    "RAISERS",
    "CanonicalizationReport",
    "NearMiss",
    "Raiser",
    "Rewriter",
    "canonicalize",
    "in_order",
    "raiser",
]


def canonicalize(graph: Graph) -> CanonicalizationReport:
    """Raise a captured graph into semantic ops, in place.

    The graph computes the same: bit for bit where an op keeps the order of operations, up to float
    rounding where it does not (activations that were written out, packed projections).

    Returns:
        Counts of the semantic ops, near misses with their reasons, and what cleanup removed.
    """
    rewriter = Rewriter(graph)
    for step in in_order():
        step.run(rewriter)
        rewriter.settle()
    graph.drop_unused_placeholders()
    name_in_order(graph)
    return CanonicalizationReport(graph.counts(), rewriter.near_misses, dict(rewriter.simplified))
