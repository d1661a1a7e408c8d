"""Cost rules of sparse prefill: what a long step computes under a mask, and what finding its blocks takes."""

from __future__ import annotations

import sympy

from graphwright.cost_model.cost import CACHE, B, C, Cost, Expr, T
from graphwright.cost_model.op_costs import add_parts, attend, cost_of, slot_bytes
from graphwright.cost_model.shapes import Call
from graphwright.ir.prefill_masks import DENSE_TOKENS, Mask, parse_mask

#: 1 for steps that attend under a mask, 0 for shorter ones.
LONG: Expr = sympy.Max(0, sympy.Min(1, T - DENSE_TOKENS))


@cost_of("prefill_attention")
def _prefill_attention(call: Call) -> Cost:
    return masked_cost(call, parse_mask(call.arg("mask")))


def masked_cost(call: Call, mask: Mask) -> Cost:
    """Attention over a cache, of which long steps see what the mask shows them.

    Args:
        call: of ``cache_attention`` or ``prefill_attention``.
    """
    kernels = call.shapes.streaming.kernels
    dense = dense_cost(call)
    _, heads, _, depth = call.shape("q")
    width, dtype = call.shape("values")[3], call.dtype("q")
    groups = call.shape("keys")[1]
    work = mask.work(T, C, heads, groups, depth)
    # What a kernel takes longer for a pair of tokens than that of dense attention counts as arithmetic.
    slower = sympy.Rational(str(kernels.masked_factor(dtype, call.shapes.compiled) if kernels else 1.0))
    pairs = 2 * B * heads * (depth + width) * T * work.seen * slower
    flops = dict(dense.flops)
    flops[dtype] = (1 - LONG) * flops[dtype] + LONG * (pairs + B * work.flops)
    again = LONG * B * (C + T) * slot_bytes(call, call.val("keys")) if work.reads_keys else 0
    read = add_parts(dict(dense.read), {CACHE: again})
    return Cost(flops, read, dense.written, dense.launches)


def dense_cost(call: Call) -> Cost:
    """The same without a mask."""
    kernels = call.shapes.streaming.kernels
    return attend(call, "keys", "values") + Cost(launches=kernels.attention_launches - 1 if kernels else 0)
