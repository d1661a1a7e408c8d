"""``skip_layers``: leave layers out, or only their attention or their feed-forward part.

A block of the residual stream (:mod:`graphwright.ir.blocks`) hands on what it reads. What only it needed
goes: its weights are not read, and its keys and values not stored. Sources: Gromov et al. 2024, "The
Unreasonable Ineffectiveness of the Deeper Layers"; Men et al. 2024, "ShortGPT"; He et al. 2024, "What Matters
in Transformers?" (attention alone). Which blocks go where only their number is given:
:mod:`graphwright.passes.layer_order`.

It runs before ``place_cache``, so that every later pass works on, and is calibrated on, the layers that are
left. Layers keep their numbers: ``layers=`` of other passes means the same with it and without.

The planner does not try it. It adds up what options lose by themselves, and skipped layers lose more together
than the sum, because those that are left make up for one that is missing. An order by measurement would take
runs of the text for every count besides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from graphwright.cost_model.graph_cost import GraphCost, graph_cost
from graphwright.cost_model.prediction import predict
from graphwright.cost_model.stores import cache_bytes, default_stores
from graphwright.cost_model.target import Target
from graphwright.cost_model.workload import Workload
from graphwright.ir.blocks import PARTS, Block, Blocks, Part, find_blocks, live_nodes, skip_blocks
from graphwright.ir.errors import PassError
from graphwright.ir.graph import Graph, layer_number, op_name, value
from graphwright.passes.base import (
    CostDelta,
    Fidelity,
    Pass,
    Site,
    Verdict,
    parse_layers,
    register_pass,
    spell_layers,
)
from graphwright.passes.layer_order import Choice, RunsText, least_missed, middle, smallest_angles

ORDERS = ("auto", "angular", "trim", "middle")


@register_pass
@dataclass(frozen=True)
class SkipLayers(Pass):
    """Leave blocks out.

    Options:
        layers: which; or
        count: how many, fewer than the model has.
        order: of ``count``, which go first: ``angular`` those that turn the stream least, ``trim`` those that
            the calibration text misses least, measured again after each, ``middle`` those around the middle.
            ``auto`` is ``angular`` where there is calibration text, and ``middle`` where there is none.
        part: ``whole`` layers, or only their ``attention`` or ``mlp``.
    """

    name: ClassVar[str] = "skip_layers"
    summary: ClassVar[str] = "leave layers out, or only their attention or feed-forward part"
    fidelity: ClassVar[Fidelity] = "lossy"

    part: str = "whole"
    count: int = 0
    order: str = "auto"

    def __post_init__(self) -> None:
        for option, given, known in (("part", self.part, PARTS), ("order", self.order, ORDERS)):
            if given not in known:
                raise PassError(
                    f"skip_layers has no {option} {given!r}", hint=f"choose one of {', '.join(known)}"
                )
        if self.count < 0:
            raise PassError(f"count={self.count} is not a number of layers", hint="give 1 or more")
        if bool(self.layers) == bool(self.count):
            both = "both layers and count" if self.layers else "neither layers nor count"
            raise PassError(f"skip_layers has {both}", hint="write layers=10-14, or count=5 and an order")
        if self.layers and self.order != "auto":
            raise PassError(
                f"order={self.order} chooses layers, and layers={self.layers} names them",
                hint="write count=5 in the place of layers",
            )

    @classmethod
    def variants(cls) -> list[Pass]:
        """None: what they lose does not add up; see the module."""
        return []

    def find(self, graph: Graph) -> list[Site]:
        blocks = find_blocks(graph)
        self._check_layers(blocks)
        part: Part = next(p for p in PARTS if p == self.part)
        shared = {"graph": graph, "skipped": {}, "price": cache(lambda: graph_cost(graph))}
        if self.count:
            chosen = self._choose(graph, blocks.of(part), len(blocks.layers))
        else:
            chosen = [Choice(block, "") for block in blocks.of(part)]
        sites = [
            Site(c.block.name, (c.block.entry, c.block.exit), {**shared, "block": c.block, "why": c.reason})
            for c in sorted(chosen, key=lambda c: c.block.layer)
        ]
        for (layer, missing), reason in blocks.missing.items():
            if missing == part and not self.count:
                sites.append(Site(f"layers.{layer}.{part}", (), {"block": None, "why": reason}))
        return sites

    def legal(self, site: Site) -> Verdict:
        why = site.info["why"]
        if site.info["block"] is None:
            return Verdict(False, f"it cannot be left out: {why}")
        return Verdict(True, f"left out{': ' if why else ''}{why}")

    def gain(self, site: Site, workload: Workload, target: Target) -> CostDelta:
        graph, block = site.info["graph"], site.info["block"]
        whole: GraphCost = site.info["price"]()
        gone = live_nodes(graph) - live_nodes(graph, dict([block.detour()]))
        saved = GraphCost({n: cost for n, cost in whole.by_node.items() if n in gone}, whole.groups)
        place: dict[str, Any] = {"batch": workload.batch, "context": workload.mean_context, "tokens": 1}
        seconds = predict(saved, target, **place, phase="decode").seconds
        stores = []
        if any("attention" in (op_name(n) or "") for n in gone):
            stores = [store for store in default_stores(graph) if layer_number(store.name) == block.layer]
        kept = cache_bytes(stores, workload.batch, workload.capacity)
        weights = sum(value(n).nbytes for n in gone if n.meta.get("kind") == "parameter")
        note = f"{-kept / 2**20:+.1f} MiB of cache, {-weights / 2**20:+.1f} MiB of weights that steps read"
        return CostDelta(-seconds, -float(kept + weights), note)

    def apply(self, site: Site, graph: Graph) -> None:
        skip_blocks(graph, [site.info["block"]], site.info["skipped"])

    # --- which -----------------------------------------------------------------------------------

    def _choose(self, graph: Graph, blocks: list[Block], total: int) -> list[Choice]:
        """``count`` of the blocks."""
        if self.count >= len(blocks):
            able = "" if len(blocks) == total else f", and {len(blocks)} have a part that can be left out"
            raise PassError(
                f"count={self.count} leaves none: the model has {total} layers{able}",
                where=self.name,
                hint=f"give 1 to {len(blocks) - 1}",
            )
        if self.order == "angular":
            return smallest_angles(graph, blocks, self.count)
        if self.order == "trim":
            return least_missed(graph, blocks, self.count)
        found = middle(blocks, self.count)
        if self.order == "middle":
            return found
        if isinstance(graph.samples, RunsText):
            return smallest_angles(graph, blocks, self.count)
        return [replace(c, reason=f"{c.reason}, as there is no text to calibrate on") for c in found]

    def _check_layers(self, blocks: Blocks) -> None:
        """Refuse layers that the model does not have, and all that it has."""
        wanted, there = parse_layers(self.layers), set(blocks.layers)
        if wanted is None:
            return
        if wanted - there:
            raise PassError(
                f"there is no layer {spell_layers(wanted - there)}",
                where=str(self),
                hint=f"the layers of this model are {spell_layers(there)}" if there else "it has no layers",
            )
        if wanted >= there:
            raise PassError(
                f"layers={self.layers} leaves none of the model's {len(there)} layers",
                where=str(self),
                hint=f"name fewer of {spell_layers(there)}",
            )
