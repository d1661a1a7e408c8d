"""What the ops of dynamic depth cost, in a step in which every layer runs."""

from __future__ import annotations

from graphwright.cost_model.cost import ACTIVATIONS, Cost
from graphwright.cost_model.op_costs import add_parts, cost_of, elementwise
from graphwright.cost_model.shapes import Call

#: Kernels of ``exits``: softmax, topk, and the comparisons.
EXIT_KERNELS = 8

cost_of("bypass", fusible=True)(elementwise)


@cost_of("exits")
def _exits(call: Call) -> Cost:
    """The logits as float32 probabilities, of which the two largest are found."""
    probabilities = {ACTIVATIONS: 2 * 4 * call.numel("logits")}  # written and read again
    flops = {"float32": 3 * call.numel("logits")}
    return Cost(flops, add_parts(call.reads("logits"), probabilities), call.writes(), EXIT_KERNELS)
