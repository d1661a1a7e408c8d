"""Cost rules where tokens are evicted: observing queries, and evicting.

Attention reads what the layer holds instead of the whole context (:mod:`graphwright.cost_model.held_tokens`).
An eviction comes once in as many tokens as the slack has room for; its cost is spread over them.
"""

from __future__ import annotations

from graphwright.cost_model.cost import ACTIVATIONS, CACHE, B, Cost, T
from graphwright.cost_model.held_tokens import held_tokens, retention_of
from graphwright.cost_model.op_costs import cost_of, slot_bytes
from graphwright.cost_model.shapes import Call
from graphwright.ir.eviction_ops import Retention

#: Kernels of ``observe_queries`` in a step of few tokens, and of one eviction of a row, for each store.
OBSERVE_KERNELS, EVICT_KERNELS = 5, 20


@cost_of("observe_queries")
def _observe_queries(call: Call) -> Cost:
    """The step's queries, and for each eviction the product of the window's with the keys that are held."""
    kept = Retention.of(call.arg("ring").meta["store"])
    _, heads, _, features = call.shape("q")
    written = {CACHE: B * T * heads * features * call.val("ring").dtype.itemsize}
    evictions = B * T / kept.interval
    pairs = evictions * heads * kept.window * held_tokens(kept)
    # Scores exist in float32, and pass through softmax, mean and sort.
    read = {**call.reads("q"), CACHE: evictions * heads * features * kept.window * 4}
    scores = Cost({"float32": 2 * pairs * features}, {ACTIVATIONS: 3 * 4 * pairs})
    return scores + Cost(read=read, written=written, launches=OBSERVE_KERNELS)


def evicting(call: Call) -> Cost:
    """Of one store, spread over the steps: what stays is read and written."""
    kept = retention_of(call.arg("store"))
    if kept is None:
        return Cost()
    evictions = B * T / kept.interval
    moved = {CACHE: evictions * held_tokens(kept) * slot_bytes(call, call.val("store"))}
    return Cost(read=moved, written=moved, launches=evictions * EVICT_KERNELS)
