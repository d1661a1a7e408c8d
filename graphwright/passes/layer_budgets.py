"""How much of the calibration text's attention each layer gives to which token: for budgets by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx.node import Node

from graphwright.ir.evictors import Seen
from graphwright.ir.graph import Graph, argument, module_path, value
from graphwright.passes.base import Site
from graphwright.passes.place_cache import add_store, step_inputs


def observe_calibration(graph: Graph, sites: Sequence[Site], window: int) -> list[Seen]:
    """What each site's layer holds after the calibration text, with its newest queries."""
    probe = graph.copy()
    names, nodes = {site.name for site in sites}, {}
    for index, attention in enumerate(probe.calls("cache_attention")):
        name = module_path(attention) or f"attention.{index}"
        if name in names:
            nodes[name] = attention
            _store_queries(probe, attention, f"{name}.probes")
    assert graph.samples is not None
    content = graph.samples(probe)
    found = []
    for site in sites:
        attention = nodes[site.name]
        keys, values = (content[argument(attention, name).meta["name"]] for name in ("keys", "values"))
        queries = content[f"{site.name}.probes"][:, :, -window:]
        blank = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        scale, softcap = (argument(attention, name) for name in ("scale", "softcap"))
        found.append(Seen(queries, keys, values, blank, scale, softcap, keys.shape[2]))
    return found


def _store_queries(graph: Graph, attention: Node, name: str) -> None:
    """Keep all queries of an attention in a store, as its keys are kept."""
    q, inputs = argument(attention, "q"), step_inputs(graph)
    _, heads, _, features = value(q).shape
    store = add_store(graph, name, int(heads), int(features), value(q), 0)
    graph.emit("cache_append", store, q, inputs["lengths"], inputs["counts"], before=attention)


def whole_tokens(shares: Sequence[float], total: int, least: int) -> list[float]:
    """Whole numbers of at least ``least`` near these, with this sum."""
    found = [max(least, int(share)) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: shares[i] - int(shares[i]), reverse=True)
    step = 0
    while sum(found) != total:
        at = order[step % len(order)]
        change = 1 if sum(found) < total else -1
        if found[at] + change >= least:
            found[at] += change
        step += 1
    return [float(n) for n in found]
