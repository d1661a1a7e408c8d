"""Cost rule of attention over a shared prefix: it is read once a step, whatever the number of sequences.

The arithmetic stays what it was: every sequence's queries meet every token of the prefix. Source: Juravsky et
al. 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes", section 3.2.
"""

from __future__ import annotations

import sympy

from graphwright.cost_model.cost import CACHE, B, C, Cost, Expr, T
from graphwright.cost_model.op_costs import cost_of, slot_bytes
from graphwright.cost_model.shapes import Call
from graphwright.ir.graph import Graph, shared_prefix

#: What gathers the queries of all rows, and lays partial results side by side, where splits are merged.
COPIES = 5


def attend_shared(call: Call, tokens: int) -> Cost:
    """Attention of T tokens over C tokens, the first ``tokens`` of which all sequences share.

    Args:
        call: an attention over stores, with arguments ``q``, ``keys``, ``values`` and ``sinks``.
    """
    _, heads, _, depth = call.shape("q")
    width = call.shape("values")[3]
    shared = sympy.Min(C, tokens)
    slots: Expr = shared + B * (C + T - shared)
    read = {CACHE: slots * slot_bytes(call, call.val("keys"), call.val("values"))}
    flops = 2 * B * heads * (depth + width) * T * (C + (T + 1) / 2)
    cost = Cost({call.dtype("q"): flops}, call.reads("q", "sinks"), call.writes(), _launches(call))
    return cost + Cost(read=read)


def _launches(call: Call) -> int:
    """One where a kernel does it all; else an attention over each part, one merge, and copies around them."""
    kernels = call.shapes.streaming.kernels
    return 1 if kernels is None or kernels.attention_launches == 1 else 3 + COPIES


@cost_of("prefix_attention")
def _prefix_attention(call: Call) -> Cost:
    return attend_shared(call, call.arg("prefix_keys").meta["store"]["tokens"])


def shared_tokens(graph: Graph) -> int:
    """Tokens that every sequence of a batch begins with, as promised to the program; 0 if none are."""
    return shared_prefix(graph.placeholders("state")) or 0
