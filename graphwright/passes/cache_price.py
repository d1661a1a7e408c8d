"""What a cut costs: bytes kept, bytes read each step, and arithmetic to recompute the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
from torch.fx.node import Node

from graphwright.cost_model.cost import CACHE, B, C, Cost
from graphwright.cost_model.graph_cost import subgraph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.graph import Graph, is_tensor, op_name, value

if TYPE_CHECKING:
    from graphwright.passes.base import Site
    from graphwright.passes.cache_cut import Cut


@dataclass(frozen=True)
class CachePrice:
    """One layer's storage for a workload.

    Attributes:
        seconds_per_token: reading the store and recomputing, in a decode step at the mean context.
        memory_bytes: resident bytes at the full context.
        recompute_everything: seconds a step would spend on this layer's keys and values without a cache.
    """

    seconds_per_token: float
    memory_bytes: float
    recompute_everything: float


def price_cut(site: Site, cut: Cut, workload: Workload, target: Target) -> CachePrice:
    """Price a cut of one layer."""
    graph: Graph = site.info["graph"]
    window = site.info["window"]
    width = sum(_row_bytes(n) for n in cut.stored)
    held = sympy.Min(C, window) if window else C
    read = Cost(read={CACHE: width * B * held})
    again = _recompute_cost(site, graph, cut.recomputed, window)
    everything = _recompute_cost(site, graph, site.info["layer"].nodes, window)

    def seconds(cost: Cost) -> float:
        return predict(cost, target, batch=workload.batch, context=workload.mean_context, tokens=1).seconds

    kept = min(workload.capacity, window) if window else workload.capacity
    return CachePrice(
        seconds(read) + seconds(again), float(width * workload.batch * kept), seconds(everything)
    )


def _row_bytes(node: Node) -> int:
    fake = value(node)
    elements = 1
    for size in fake.shape[1:]:
        if isinstance(size, int):
            elements *= size
    return elements * fake.element_size()


def _recompute_cost(site: Site, graph: Graph, nodes: Sequence[Node], window: int) -> Cost:
    """Over the slots a step reads: all, or the window's. Memoized: alike layers recompute alike."""
    if not nodes:
        return Cost()
    prices: dict[Any, Cost] = site.info["prices"]
    key = (window, *(_signature(n) for n in nodes))
    if key not in prices:
        prices[key] = subgraph_cost(graph, nodes, sympy.Min(C, window) if window else C)
    return prices[key]


def _signature(node: Node) -> tuple[str | None, str]:
    return op_name(node), str(tuple(value(node).shape)) if is_tensor(node) else ""
